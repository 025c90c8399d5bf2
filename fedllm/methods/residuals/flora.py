"""FLoRA: the stacked updates are merged into the base every round, and adapters start anew.

Wang et al., NeurIPS 2024, https://arxiv.org/abs/2409.05976: the stack of all B_i and A_i, scaled by
p_i s_i, has the product sum_i p_i s_i B_i A_i, at any mix of ranks. It is added to the base,
W_0 <- W_0 + sum_i p_i s_i B_i A_i, and every client begins the next round with a new A and B = 0.

Legend: G modules, O out, I in, R rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Decomposition, Partial, Start
from fedllm.lora.factors import FactorBlock, ModuleShape, initial_a
from fedllm.methods.diagnostics import diagnose, held_partitions, partition_qualities
from fedllm.methods.pairs.pair_state import PairMethod
from fedllm.methods.products import keep
from fedllm.methods.protocol import ModuleAggregate, ServerStep
from fedllm.methods.residuals.base_state import Added, ChangesBase, mean_of
from fedllm.methods.state import carried
from fedllm.planning.seeding import seed_of


@dataclass(frozen=True, kw_only=True)
class Flora(ChangesBase, PairMethod):
    """The mean of products, merged into the base; new adapters every round."""

    name: ClassVar[str] = "flora"

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i s_i B_i A_i of the block, as the problem's route holds it."""
        return routes.fold(block, step.problem)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the base with the mean of products in it; everybody receives all of that."""
        products: list[Partial] = []
        for block in partials:
            keep(block, products)
        places = range(len(step.modules))
        merged = [mean_of(products, place, total=step.total) for place in places]
        found = routes.decompose(products, step.problem, total=step.total, start=self.start(step))
        lost = [0.0 for _ in places]
        return [
            self.merged(place, each, step, added=merged[place], lost=lost[place])
            for place, each in enumerate(found)
        ]

    def start(self, step: ServerStep) -> Start:
        """Return the start of an iterative route."""
        return Start(seed=seed_of(self.seed, "aggregation", step.modules[0]))

    def merged(
        self,
        place: int,
        found: Decomposition,
        step: ServerStep,
        *,
        added: Added,
        lost: float,
    ) -> ModuleAggregate:
        """Return a module's state with a change in its base; diagnostics are of the mean.

        Args:
            place: the module's among those of `step`.
            found: the leading triplets of the mean of products.
            step: as in `finish`.
            added: what the base gets.
            lost: the energy of the mean that is not added.
        """
        module, problem = step.modules[place], step.problem
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        # a new A for every round, so that all rounds together reach any direction
        seed = seed_of(self.seed, self.name, step.round)
        a_RI = initial_a(seed=seed, module=module, rank=problem.rank, shape=shape)
        parts = {"A": a_RI, "B": torch.zeros(problem.out, problem.rank)}
        none = [0.0 for _ in held_partitions(problem)]
        state = {**carried(module, parts), **self.changed(place, added, step)}
        return ModuleAggregate(
            state=state,
            diagnostics=diagnose(
                found,
                ranks=step.ranks,
                stacked_rank=problem.stacked_rank,
                # adapters begin at zero: they hold no energy
                partitions=partition_qualities(
                    problem, total=step.total, before=none, after=none, untrained=_all
                ),
                left=dict.fromkeys(step.ranks, lost),
            ),
        )


def _all(_part: object) -> float:
    return 1.0
