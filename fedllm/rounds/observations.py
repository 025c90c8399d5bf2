"""Observations of a coordinator, on its own clock; they may be lost at any time."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.storage.records import CohortRecord, PreparedRecord


@dataclass(kw_only=True)
class Observations:
    """Observations: times of the next look, silent workers, arrays that found no room.

    Lasting decisions are records. A new coordinator starts without observations.

    Attributes:
        cancelled: task -> why it was cancelled.
        content: the prepared record whose base and data were found to be those of round 1.
        done: rounds below this number are done.
        attempts: round -> number of the last attempt that was started.
        holders: attempt's folder -> tasks that hold its claims, once every bundle is claimed.
        unclaimed: (attempt's folder, class) -> numbers of its bundles not found claimed yet.
        training_seconds: for how long the current attempt has been watched; None: none trains.
        last_round: the last round of a run that was stopped early; None: it was not.
        no_room: names of arrays that the scheduler had no room for.
        prepares: the run is being prepared; what is found is told at the end of it.
        step: what the coordinator is doing, in one word, and of which round.
    """

    cancelled: dict[str, str] = field(default_factory=dict)
    content: PreparedRecord | None = None
    done: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    holders: dict[Path, set[str]] = field(default_factory=dict)
    unclaimed: dict[tuple[Path, str], list[int]] = field(default_factory=dict)
    training_seconds: float | None = None
    no_room: set[str] = field(default_factory=set)
    last_round: int | None = None
    prepares: bool = False
    step: tuple[str, int] = ("start", 0)
    _tiers: tuple[CohortRecord, Mapping[str, str]] | None = None
    _next: dict[object, float] = field(default_factory=dict)
    _unchanged: dict[str, tuple[object, float]] = field(default_factory=dict)

    def tiers_of(self, cohort: CohortRecord) -> Mapping[str, str]:
        """Return client -> tier of a cohort, computed once."""
        if self._tiers is None or self._tiers[0] is not cohort:
            self._tiers = cohort, {client.id: client.tier for client in cohort.clients}
        return self._tiers[1]

    def training_seconds_of(self, attempt: Path) -> float:
        """Return the seconds for which an attempt has been watched."""
        return self.silent_seconds(str(attempt), "training")

    def is_due(self, action: object, seconds: float) -> bool:
        """Return whether an action is due; if so, it is due again after `seconds`."""
        now = time.monotonic()
        if now < self._next.get(action, now):
            return False
        self._next[action] = now + seconds
        return True

    def look_again(self, action: object) -> None:
        """Make an action due at once."""
        self._next.pop(action, None)

    def is_new(self, subject: object) -> bool:
        """Return whether this is the first call for a subject."""
        return self.is_due(subject, math.inf)

    def restart_silence(self, task: str) -> None:
        """Count the silence of a task anew: it could not write a heartbeat."""
        self._unchanged.pop(task, None)

    def silent_seconds(self, task: str, heartbeat: object) -> float:
        """Return the seconds since the heartbeat of a task was first seen with this value."""
        now = time.monotonic()
        last = self._unchanged.get(task)
        if last is None or last[0] != heartbeat:
            last = self._unchanged[task] = (heartbeat, now)
        return now - last[1]
