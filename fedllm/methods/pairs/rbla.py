"""RBLA: each row of A and column of B averaged over the clients whose rank reaches it.

RBLA (https://arxiv.org/abs/2408.08699), and FediLoRA (https://arxiv.org/abs/2509.06984):
A[j] = sum_{i: r_i >= j} (n_i / N_j) A_i[j], B[:, j] the same, N_j the sum of n_i over the clients
with r_i >= j. A direction that no client of the round trains stays as it was. A client of rank r
receives the first r rows and columns, not the best approximation of its rank. It is the
factor-wise counterpart of raFLoRA.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.pairs.pair_state import PairMethod, summed
from fedllm.methods.protocol import ModuleAggregate, ServerStep
from fedllm.methods.weights import direction_weights


@dataclass(frozen=True, kw_only=True)
class Rbla(PairMethod):
    """The means of factors, direction by direction."""

    name: ClassVar[str] = "rbla"

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i A_i and sum_i n_i B_i of the block, padded with zeros."""
        return self.factor_sums(block, step.problem, block.weights_GC)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the means of the directions that anyone trained, the others as they were."""
        sums = summed(partials)
        weights_R = direction_weights(step.problem)[: step.problem.rank].to(sums["A"].device)
        reached_R = weights_R > 0
        divisor_R = torch.where(reached_R, weights_R, 1.0)
        results = []
        for place, state in enumerate(step.before):
            a_RI, b_OR = sums["A"][place], sums["B"][place]
            pair = {
                "A": torch.where(reached_R[:, None], a_RI / divisor_R[:, None], state["A"]),
                "B": torch.where(reached_R, b_OR / divisor_R, state["B"]),
            }
            results.append(self.aggregate_of(place, pair, step, untrained=lambda _part: 1.0))
        return results
