"""What a coordinator keeps in mind, on its own clock; all of it can be lost."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.storage.records import CohortRecord, PreparedRecord


@dataclass(kw_only=True)
class Observations:
    """Moments to look again, workers that are silent, arrays that found no room.

    Decisions that last are records; a coordinator that starts anew watches anew.
    """

    cancelled: dict[str, str] = field(default_factory=dict)
    content: PreparedRecord | None = None
    done: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    holders: dict[Path, set[str]] = field(default_factory=dict)
    unclaimed: dict[tuple[Path, str], list[int]] = field(default_factory=dict)
    training_seconds: float | None = None
    no_room: set[str] = field(default_factory=set)
    _tiers: tuple[CohortRecord, Mapping[str, str]] | None = None
    _next: dict[object, float] = field(default_factory=dict)
    _unchanged: dict[str, tuple[object, float]] = field(default_factory=dict)

    def tiers_of(self, cohort: CohortRecord) -> Mapping[str, str]:
        """Return client -> tier of a cohort, made once."""
        if self._tiers is None or self._tiers[0] is not cohort:
            self._tiers = cohort, {client.id: client.tier for client in cohort.clients}
        return self._tiers[1]

    def training_seconds_of(self, attempt: Path) -> float:
        """Return for how long an attempt has been watched."""
        return self.silent_seconds(str(attempt), "training")

    def is_due(self, what: object, seconds: float) -> bool:
        """Say whether to do something now that is done every `seconds`."""
        now = time.monotonic()
        if now < self._next.get(what, now):
            return False
        self._next[what] = now + seconds
        return True

    def look_again(self, what: object) -> None:
        """Have what is done every so often be due."""
        self._next.pop(what, None)

    def is_new(self, what: object) -> bool:
        """Say whether this is asked for the first time."""
        return self.is_due(what, math.inf)

    def silent_seconds(self, task: str, progress: object) -> float:
        """Return for how long the progress of a task has been seen unchanged."""
        now = time.monotonic()
        seen = self._unchanged.get(task)
        if seen is None or seen[0] != progress:
            seen = self._unchanged[task] = (progress, now)
        return now - seen[1]
