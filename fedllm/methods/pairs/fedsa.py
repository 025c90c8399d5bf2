"""FedSA-LoRA: A is shared, B stays with the client.

Guo et al., ICLR 2025, https://arxiv.org/abs/2410.01463: clients train both factors and send A
alone; A = sum_i p_i A_i. Every client goes on with the new A and its own B of the last round in
which it took part; at first B is that of the start. There is no adapter for all: a client is
evaluated with its own B, and one that never trained with the B of the start.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import Factors
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep, StateNotes
from fedllm.storage.records import SentFactors


@dataclass(frozen=True, kw_only=True)
class FedSa(FactorMean):
    """The mean of every client's A; each keeps its B."""

    name: ClassVar[str] = "fedsa"
    per_client: ClassVar[bool] = True
    keeps_at_clients: ClassVar[bool] = True
    # B of the state never moves
    server_sides: ClassVar[tuple[str, ...]] = ()

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return the A of all, and the B that the client kept."""
        start = self.module_adapter(module=module, state=state, rank=rank)
        return replace(start, b_OR=to.kept["B"]) if "B" in to.kept else start

    def kept(self, *, module: str, trained: Factors) -> ModuleState:
        """Return B."""
        del module
        return {"B": trained.b_OR}

    def sent_factors(self, round_number: int) -> SentFactors:
        """Return A alone."""
        del round_number
        return "A"

    def sent(self, *, module: str, trained: Factors, notes: StateNotes) -> Factors:
        """Return zeros in the place of B: its norm stays with the client too."""
        del module, notes
        return replace(trained, b_OR=torch.zeros_like(trained.b_OR))

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return sum_i p_i A_i, and the B of the start."""
        results = super().finish(partials, step)
        if not step.clients:  # a starting adapter has the B of the start
            return results
        return [
            replace(result, state={**result.state, "B": before["B"].cpu()})
            for result, before in zip(results, step.before, strict=True)
        ]
