"""Turns of a conversation: what the readers hand on and the templates render."""

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
