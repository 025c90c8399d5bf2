"""FedSVD: clients train B alone, and an SVD of the product gives them a new A every round.

Lee et al., https://arxiv.org/abs/2505.12805: B = sum_i p_i B_i with the A that all received,
U S V^T = SVD(B A), and the next round begins with A = V_r^T, B = U_r S_r. The rows of A are
orthonormal, and nothing is lost: B A has rank r. What the rows of A span stays as it was drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.local_task import LocalTask
from fedllm.methods.protocol import ModuleAggregate, ServerStep
from fedllm.methods.refusals import refuse_mixed_ranks
from fedllm.methods.spectral.spectral_state import SpectralMethod


@dataclass(frozen=True, kw_only=True)
class FedSvd(SpectralMethod):
    """The SVD of the mean of products that share their A."""

    name: ClassVar[str] = "fedsvd"

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return a reason where two tiers' ranks differ: all clients share one A."""
        return refuse_mixed_ranks(self.name, tier_ranks)

    def local_task(self, round_number: int) -> LocalTask:
        """Return B, in every round."""
        del round_number
        return LocalTask(trained="B")

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i s B_i A of the block, as the problem's route holds it."""
        return routes.fold(block, step.problem)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the singular triplets of the weighted means, all able to train."""
        return self.decomposed(
            partials,
            step,
            divisor=step.total,
            untrained=lambda part: part.weight / step.total,
        )
