"""Rows as their owners wrote them, and the turns of conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]

TURNS = "turns"
"""Canonical column of conversations: a list of {role, content} per row, null without one.

A conversation ends with its last assistant turn, which is also the row's first reference.
"""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """Row as its owner wrote it; the first reference is the answer to train.

    A conversation has `turns`, which end with the last assistant turn, and neither instruction nor
    input. All other rows have no turns.
    """

    instruction: str
    input: str
    references: Sequence[str]
    turns: tuple[Turn, ...] = ()

    @property
    def answer(self) -> str:
        """The answer to train, empty without one."""
        return self.references[0] if self.references else ""
