"""FLoRIST: as FLoRA, of the stacked updates only the leading singular directions.

Ramesh and Dass, MLSys 2026, https://arxiv.org/abs/2506.09199: thin SVDs of the stacks give the
singular values of sum_i p_i s_i B_i A_i without forming it. Of every module the k leading triplets
are kept, the fewest whose share of the energy, sum_{j <= k} S_j^2 / sum_j S_j^2, reaches
`threshold`. All clients merge them into the base, and start anew. At threshold 1 it is FLoRA.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.options import FloristOptions
from fedllm.methods.protocol import ModuleAggregate, ServerStep
from fedllm.methods.residuals import held_energy
from fedllm.methods.residuals.flora import Flora


@dataclass(frozen=True, kw_only=True)
class Florist(Flora):
    """The leading directions of the mean of products, merged into the base."""

    name: ClassVar[str] = "florist"
    options_class: ClassVar[type[FloristOptions]] = FloristOptions

    options: FloristOptions = field(default_factory=FloristOptions)

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i s_i B_i A_i of the block, as the route to its triplets holds it."""
        return held_energy.fold(block, step.problem, self.options.threshold)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the base with the leading directions of the mean in it."""
        share = self.options.threshold
        start = self.start(step)
        found = held_energy.hold(partials, step.problem, share, total=step.total, start=start)
        return [
            self.merged(
                place,
                each.leading,
                step,
                added=each.held,
                lost=max(0.0, each.leading.total_energy - each.energy),
            )
            for place, each in enumerate(found)
        ]
