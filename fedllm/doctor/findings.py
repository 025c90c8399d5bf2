"""Findings of `fedllm doctor`, with what to change."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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


def describe_findings(findings: Sequence[Finding]) -> str:
    """Return findings as text: one line each, and one below it with what to change."""
    width = max(len(finding.level) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<{width}}  {finding.check}: {finding.found}")
        if finding.change:
            lines.append(f"{'':<{width}}  -> {finding.change}")
    count = Counter(finding.level for finding in findings)
    total = ", ".join(f"{count[level]} {level}" for level in get_args(Level))
    return "\n".join([*lines, "", total])
