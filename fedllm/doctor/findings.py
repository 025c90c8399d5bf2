"""What `fedllm doctor` found, and what to change."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail", "not done"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        check: what was looked at.
        level: `not done`: it could not be; `found` says why.
        found: in a line.
        change: what to change in which key; empty: nothing.
    """

    check: str
    level: Level
    found: str
    change: str = ""
