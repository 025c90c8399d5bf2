"""Rows as their owners wrote them, and the turns of those that are conversations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]

TURNS = "turns"
"""The canonical column of conversations: a list of {role, content} per row, null without one.

A conversation ends with its last assistant turn, which is also the row's first reference.
"""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A row as its owner wrote it; the first reference is the answer to train.

    A conversation has `turns`, up to and with its last assistant turn, and neither instruction
    nor input; an ordinary row has no turns.
    """

    instruction: str
    input: str
    references: Sequence[str]
    turns: tuple[Turn, ...] = ()

    @property
    def answer(self) -> str:
        """The answer to train, empty where there is none."""
        return self.references[0] if self.references else ""
