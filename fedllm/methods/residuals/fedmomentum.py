"""FedMomentum: the leading directions of the mean go on as adapter, the next ones into the base.

https://arxiv.org/abs/2603.08014: U S V^T = SVD(sum_i p_i s B_i A_i); the adapter is its best
approximation of rank r, split evenly, s B A with B = U_r sqrt(S_r / s) and A = sqrt(S_r / s) V_r^T,
so that the next round moves on from where the clients were going. The components r + 1 to r_eff,
the fewest with a share `energy` of all energy, are added to the base.

Directions with S = 0 get a seeded row of A and B = 0: with both factors zero they never train.

Legend: O out, I in, R rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.options import FedMomentumOptions
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep
from fedllm.methods.refusals import refuse_mixed_ranks
from fedllm.methods.residuals import held_energy
from fedllm.methods.residuals.base_state import ChangesBase
from fedllm.methods.spectral.spectral_state import SpectralMethod


@dataclass(frozen=True, kw_only=True)
class FedMomentum(ChangesBase, SpectralMethod):
    """The SVD of the mean of products, its tail in the base."""

    name: ClassVar[str] = "fedmomentum"
    options_class: ClassVar[type[FedMomentumOptions]] = FedMomentumOptions

    options: FedMomentumOptions = field(default_factory=FedMomentumOptions)

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return a reason where two tiers' ranks differ: all clients have one adapter."""
        return refuse_mixed_ranks(self.name, tier_ranks)

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the adapter of the state, S split evenly between A and B."""
        whole = super().module_adapter(module=module, state=state, rank=rank)
        root_R = (state["S"][:rank] / whole.scale).sqrt()
        lives_R = root_R > 0
        a_RI = torch.where(lives_R[:, None], root_R[:, None] * whole.a_RI, whole.a_RI)
        return replace(whole, a_RI=a_RI, b_OR=state["U"][:, :rank] * root_R)

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i s_i B_i A_i of the block, as the route to its triplets holds it."""
        return held_energy.fold(block, step.problem, self.options.energy)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the leading triplets, and the next ones on the change of the base."""
        share, start = self.options.energy, self.start_of(step)
        found = held_energy.hold(partials, step.problem, share, total=step.total, start=start)
        results = self.aggregates(
            [each.leading for each in found], step, untrained=lambda part: part.weight / step.total
        )
        return [
            replace(result, state={**result.state, **self.changed(place, each.tail(), step)})
            for place, (each, result) in enumerate(zip(found, results, strict=True))
        ]
