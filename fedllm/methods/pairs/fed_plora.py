"""Fed-PLoRA: a client trains r_i of R rank-one parts, the others are in its base as they are.

https://arxiv.org/abs/2602.16936: the global adapter is the sum of R parts b_j a_j. A client trains
r_i of them, drawn every round, with the others frozen, so that it trains against the whole model.
Part j becomes the mean over the clients that trained it, weighted by n_i; a part that nobody
trained stays.

The others are more bytes down, and none up. Clients that train different parts follow the same
rest, and each part moves by all of its own mean: the state may move several times as far as the
mean client. A learning rate has to be the lower, the fewer of the R parts a client trains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.drawn_parts import DrawnParts
from fedllm.methods.pairs.pair_state import summed
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep


@dataclass(frozen=True, kw_only=True)
class FedPLora(DrawnParts):
    """The means of parts, each over the clients that trained it."""

    name: ClassVar[str] = "fed_plora"

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return the parts that a client trains, with all others frozen beside them."""
        self.module_adapter(module=module, state=state, rank=rank)  # refuses too high a rank
        held, own = state["A"].shape[0], self.scale(rank)
        places = self.drawn(rank=rank, held=held, to=to)
        others = torch.ones(held, dtype=torch.bool)
        others[places] = False
        rest = Factors(a_RI=state["A"][others], b_OR=state["B"][:, others], scale=self.scale(held))
        return Factors(
            a_RI=state["A"][places],
            b_OR=state["B"][:, places] * (self.scale(held) / own),
            scale=own,
            frozen=rest if rest.rank else None,
        )

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sums over the clients that trained a part."""
        return self.part_sums(block, step)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the means of the parts that anyone trained, the others as they were."""
        sums = summed(partials)
        results = []
        for place, before in enumerate(step.before):
            reach_R = sums["reach"][place]
            trained_R = reach_R > 0
            divisor_R = torch.where(trained_R, reach_R, 1.0)
            a_RI = sums["A"][place] / divisor_R[:, None]
            pair = {
                "A": torch.where(trained_R[:, None], a_RI, before["A"].to(a_RI)),
                "B": torch.where(trained_R, sums["B"][place] / divisor_R, before["B"].to(a_RI)),
            }
            results.append(self.aggregate_of(place, pair, step, untrained=lambda _part: 1.0))
        return results
