"""Factor mean: A and B averaged separately, at one rank for all.

What FedAvg (McMahan et al., https://arxiv.org/abs/1602.05629) and FedIT (Zhang et al.,
https://arxiv.org/abs/2305.05644) do with LoRA adapters. The product of the means is not the mean
of the products: the baseline that FlexLoRA is compared with.

With private clients n_i is what the clipped change of client i counts, n the cohort's size, and
the sums get noise: A' = A + (sum_i n_i (A_i - A) + noise) / n, and B' the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch

from fedllm.aggregation.route_types import Partial
from fedllm.errors import AdapterError
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.pairs.pair_state import PairMethod, summed
from fedllm.methods.privacy import noise
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep
from fedllm.methods.refusals import refuse_mixed_ranks


@dataclass(frozen=True, kw_only=True)
class FactorMean(PairMethod):
    """The mean of every client's A and the mean of every client's B."""

    name: ClassVar[str] = "factor_mean"

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return a reason where two tiers' ranks differ: means need factors of one shape."""
        return refuse_mixed_ranks(self.name, tier_ranks)

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the state itself: the one rank it has."""
        held = state["A"].shape[0]
        if rank != held:
            raise AdapterError(
                f"{module}: rank {rank} asked of a factor mean of rank {held}: ask for {held}"
            )
        return Factors(a_RI=state["A"], b_OR=state["B"], scale=self.scale(rank))

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i A_i and sum_i n_i B_i of the block.

        A client whose scale is not the state's has the difference folded into its B.
        """
        held = sorted({rank for rank in block.ranks if rank})
        rank = step.problem.rank
        if held and held != [rank]:
            raise AdapterError(
                f"{self.name} needs adapters of one shape and rank, got ranks "
                f"{', '.join(map(str, held))} for rank {rank}: use flexlora"
            )
        return self.factor_sums(block, step.problem, block.weights_GC)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return sum_i p_i A_i and sum_i p_i B_i; the diagnostics are those of their product."""
        if set(step.ranks) != {step.problem.rank}:
            raise AdapterError(
                f"{step.modules[0]}: {self.name} has one rank for all, got "
                f"{sorted(set(step.ranks))}"
            )
        # an update is the client's whole adapter: the state before is only compared with
        sums = summed(chain(partials, [self._private(step)] if step.noise_std else []))
        return [
            self.aggregate_of(
                place,
                {"A": a_RI / step.total, "B": b_OR / step.total},
                step,
                untrained=lambda part: part.weight / step.total,
            )
            for place, (a_RI, b_OR) in enumerate(zip(sums["A"], sums["B"], strict=True))
        ]

    def _private(self, step: ServerStep) -> Partial:
        """Return what the changes' sums lack of the state, and the noise of factors that train."""
        missed = step.total - sum(part.weight for part in step.problem.partitions)
        found = {}
        for name in ("A", "B"):
            before = torch.stack([state[name] for state in step.before]).double()
            found[name] = missed * before
            if name in self.local_task(step.round).trained:
                found[name] += noise(step, name, before.shape[1:], seed=self.seed)
        return found
