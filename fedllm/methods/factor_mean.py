"""Factor mean: A and B averaged separately, at one rank for all.

What FedAvg (McMahan et al., https://arxiv.org/abs/1602.05629) and FedIT (Zhang et al.,
https://arxiv.org/abs/2305.05644) do with LoRA adapters. The product of the means is not the mean
of the products: the baseline that FlexLoRA is compared with.

Legend: G modules, C clients, O out, I in, R rank of the state and of every client.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.decomposition import Decomposition, Partial, Problem
from fedllm.aggregation.routes import truncated_svd
from fedllm.errors import AdapterError
from fedllm.lora.factors import FactorBlock, Factors, ModuleShape, initial_a, scale_of, stack
from fedllm.lora.spectral import alive_directions
from fedllm.methods.diagnostics import diagnose, partition_qualities, spectral_energies
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState
from fedllm.methods.state import carried
from fedllm.methods.weights import amounts

_SUMS = torch.float64


@dataclass(frozen=True, kw_only=True)
class FactorMean(Method):
    """The state is a factor pair, `A` (R, I) and `B` (O, R), at the scale of a client."""

    kind: ClassVar[str] = "lora"
    name: ClassVar[str] = "factor_mean"

    seed: int
    alpha: float
    scaling: str = "fixed"

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        return {"A": (rank, shape.in_), "B": (shape.out, rank)}

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return a reason where two tiers' ranks differ: means need factors of one shape."""
        for name in sorted({name for ranks in tier_ranks for name in ranks}):
            found = sorted({ranks[name] for ranks in tier_ranks if name in ranks})
            if len(found) > 1:
                return (
                    f"method.name: factor_mean averages factors of one rank, but clients.tiers "
                    f"gives {name} the ranks {', '.join(map(str, found))}: "
                    f"set all to {found[0]}, or use flexlora"
                )
        return None

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return no change yet: the seeded A, and B zero."""
        a_RI = initial_a(seed=self.seed, module=module, rank=rank, shape=shape)
        return {"A": a_RI, "B": torch.zeros(shape.out, rank)}

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the state itself: the one rank it has."""
        held = state["A"].shape[0]
        if rank != held:
            raise AdapterError(
                f"{module}: rank {rank} asked of a factor mean of rank {held}: ask for {held}"
            )
        return Factors(a_RI=state["A"], b_OR=state["B"], scale=self._scale(rank))

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return n_i."""
        return amounts(rows)

    def fold(self, block: FactorBlock, problem: Problem) -> Partial:
        """Return sum_i n_i A_i and sum_i n_i B_i of the block.

        A client whose scale is not the state's has the difference folded into its B.
        """
        held = sorted({rank for rank in block.ranks if rank})
        if held and held != [problem.rank]:
            raise AdapterError(
                "factor_mean needs adapters of one shape and rank, got ranks "
                f"{', '.join(map(str, held))} for rank {problem.rank}: use flexlora"
            )
        a_GRI = block.a_GRI.new_zeros(len(block.a_GRI), problem.rank, problem.in_, dtype=_SUMS)
        b_GOR = block.b_GOR.new_zeros(len(block.b_GOR), problem.out, problem.rank, dtype=_SUMS)
        weights_GC = block.weights_GC.to(a_GRI.device)
        scaled_GC = weights_GC * block.scales_GC.to(a_GRI.device) / self._scale(problem.rank)
        end = 0
        for client, rank in enumerate(block.ranks):
            begin, end = end, end + rank
            if rank:
                a_GRI += weights_GC[:, client, None, None] * block.a_GRI[:, begin:end]
                b_GOR += scaled_GC[:, client, None, None] * block.b_GOR[:, :, begin:end]
        return {"A": a_GRI, "B": b_GOR}

    def finish(
        self,
        modules: Sequence[str],
        *,
        problem: Problem,
        partials: Iterable[Partial],
        total: float,
        before: Sequence[ModuleState],
        ranks: Sequence[int],
    ) -> list[ModuleAggregate]:
        """Return sum_i p_i A_i and sum_i p_i B_i; the diagnostics are those of their product."""
        if set(ranks) != {problem.rank}:
            raise AdapterError(
                f"{modules[0]}: factor_mean has one rank for all, got {sorted(set(ranks))}"
            )
        # an update is the client's whole adapter: the state before is only compared with
        a_GRI, b_GOR = _summed(partials)
        return [
            self._aggregate(
                module,
                {"A": a_RI / total, "B": b_OR / total},
                problem=problem,
                total=total,
                before=state,
            )
            for module, a_RI, b_OR, state in zip(modules, a_GRI, b_GOR, before, strict=True)
        ]

    def _aggregate(
        self,
        module: str,
        mean: ModuleState,
        *,
        problem: Problem,
        total: float,
        before: ModuleState,
    ) -> ModuleAggregate:
        product, product_before = self._product(mean), self._product(before)
        return ModuleAggregate(
            state=carried(module, mean),
            diagnostics=diagnose(
                product,
                ranks=[problem.rank],
                stacked_rank=mean["A"].shape[0],
                before=alive_directions(product_before.spectral),
                partitions=partition_qualities(
                    problem,
                    total=total,
                    before=spectral_energies(problem, product_before.spectral.s_R),
                    after=spectral_energies(problem, product.spectral.s_R),
                    untrained=lambda part: part.weight / total,
                ),
            ),
        )

    def _product(self, pair: ModuleState) -> Decomposition:
        rank = pair["A"].shape[0]
        factors = Factors(a_RI=pair["A"], b_OR=pair["B"], scale=self._scale(rank))
        return truncated_svd(stack([factors], [1.0]), rank=rank)

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return None: the base stays as it is."""
        del state
        return None

    def _scale(self, rank: int) -> float:
        return scale_of(alpha=self.alpha, scaling=self.scaling, rank=rank)


def _summed(partials: Iterable[Partial]) -> tuple[Tensor, Tensor]:
    """Return the sums of A and of B, in the place of the first ones.

    No block is held while the next one is made.
    """
    blocks = iter(partials)
    block = next(blocks)
    a_GRI, b_GOR = block["A"], block["B"]
    del block
    for block in blocks:
        a_GRI += block["A"]
        b_GOR += block["B"]
        del block
    return a_GRI, b_GOR
