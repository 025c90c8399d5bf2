"""A method whose clients count the rounds that they took part in."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.fedsa import FedSa
from fedllm.methods.protocol import ModuleState, StateNotes


@dataclass(frozen=True, kw_only=True)
class Counting(FedSa):
    """FedSA whose clients begin with B = 0 again after their second round."""

    name: ClassVar[str] = "counting"

    def kept_notes(self, *, before: StateNotes, trained: Adapter) -> StateNotes:
        """Return the number of rounds, and of modules."""
        return {"rounds": before.get("rounds", 0) + 1, "modules": len(trained)}

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return the A of all, and the client's own B or zero."""
        got = super().hand_out(module=module, state=state, rank=rank, to=to)
        return replace(got, b_OR=got.b_OR * 0.0) if to.notes.get("rounds") == 2 else got
