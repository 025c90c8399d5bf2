"""Findings of `fedllm doctor`, with what to change."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail", "not done"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        check: the thing that was checked.
        level: the result; `not done`: it could not be checked, and `found` says why.
        found: the facts, in one line.
        change: what to change in which key; empty: nothing.
    """

    check: str
    level: Level
    found: str
    change: str = ""
