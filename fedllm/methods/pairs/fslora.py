"""FSLoRA: every client trains a sketch of the global factors, B S_i A.

Fang et al., https://arxiv.org/abs/2501.19389: S_i is diagonal with r_i of R entries R / r_i, drawn
every round, so that it is the identity on average; a client receives and trains only the columns of
B and rows of A that S_i names. The server adds the mean of the changes,
B <- B + sum_i p_i (B_i - B) and A the same, where what a client did not train has not changed.

A client's own scale is s_{r_i}: it receives B times s_R R / (r_i s_{r_i}), which is 1 where scales
are alpha / r.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.drawn_parts import DrawnParts
from fedllm.methods.pairs.pair_state import summed
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep


@dataclass(frozen=True, kw_only=True)
class FsLora(DrawnParts):
    """The mean of the changes of the sketched factors."""

    name: ClassVar[str] = "fslora"

    def part_scale(self, *, rank: int, held: int) -> float:
        """Return s_R R / r, the scale of an entry of S_i."""
        return self.scale(held) * held / rank

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return the sketch of a client."""
        self.module_adapter(module=module, state=state, rank=rank)  # refuses too high a rank
        held, own = state["A"].shape[0], self.scale(rank)
        places = self.drawn(rank=rank, held=held, to=to)
        b_OR = state["B"][:, places] * (self.part_scale(rank=rank, held=held) / own)
        return Factors(a_RI=state["A"][places], b_OR=b_OR, scale=own)

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sums over the clients that trained a part."""
        return self.part_sums(block, step)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the factors with the mean of the changes in addition."""
        sums = summed(partials)
        results = []
        for place, before in enumerate(step.before):
            # N_j of the weight trained part j: sum_i p_i (B_i - B) = (sum_i n_i B_i - N_j B) / n
            kept_R = 1.0 - sums["reach"][place] / step.total
            pair = {
                "A": sums["A"][place] / step.total + kept_R[:, None] * before["A"],
                "B": sums["B"][place] / step.total + kept_R * before["B"],
            }
            results.append(self.aggregate_of(place, pair, step, untrained=lambda _part: 1.0))
        return results
