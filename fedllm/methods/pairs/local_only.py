"""Local only: no client learns from another one.

The baseline that a federation has to beat (McMahan et al., https://arxiv.org/abs/1602.05629, train
on local data alone). Every client keeps its whole adapter and sends zeros; the state stays what it
was before the first round, so a client that never trained is scored with the untouched base.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.pair_state import PairMethod, summed
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep, StateNotes


@dataclass(frozen=True, kw_only=True)
class LocalOnly(PairMethod):
    """An adapter for each client, and none for all."""

    name: ClassVar[str] = "local_only"
    per_client: ClassVar[bool] = True
    keeps_at_clients: ClassVar[bool] = True
    server_sides: ClassVar[tuple[str, ...]] = ()

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return the adapter that the client kept; before its first round, the start."""
        start = self.module_adapter(module=module, state=state, rank=rank)
        if "A" not in to.kept:
            return start
        return replace(start, a_RI=to.kept["A"], b_OR=to.kept["B"])

    def kept(self, *, module: str, trained: Factors) -> ModuleState:
        """Return the whole adapter."""
        del module
        return {"A": trained.a_RI, "B": trained.b_OR}

    def sent(self, *, module: str, trained: Factors, notes: StateNotes) -> Factors:
        """Return zeros: an update says only that the client trained."""
        del module, notes
        a_RI, b_OR = torch.zeros_like(trained.a_RI), torch.zeros_like(trained.b_OR)
        return replace(trained, a_RI=a_RI, b_OR=b_OR)

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return the sums of what was sent, which are zero."""
        return self.factor_sums(block, step.problem, block.weights_GC)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the states as they were; a starting adapter becomes the first state."""
        sums = summed(partials)
        return [
            self.aggregate_of(
                place,
                {name: before[name] for name in ("A", "B")}
                if step.clients
                else {name: sums[name][place] / step.total for name in ("A", "B")},
                step,
                untrained=lambda _part: 1.0,
            )
            for place, before in enumerate(step.before)
        ]
