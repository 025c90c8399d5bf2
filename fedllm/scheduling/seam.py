"""The one narrow seam between a run and whatever starts its jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal, Protocol

from fedllm.errors import Incomplete

Program = Literal["prepare", "client", "aggregate", "evaluate"]
Option = str | int | float | bool | None


class SchedulerUnreachable(Incomplete):
    """The scheduler does not answer now; asking again later may help."""


class TaskState(Enum):
    """What is known of a task."""

    WAITING = "waiting"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Job:
    """An array of identical tasks: `tasks` times `program argv`."""

    name: str
    program: Program
    argv: tuple[str, ...]
    log_folder: Path
    tasks: int = 1
    options: Mapping[str, Option] = field(default_factory=dict)


class Scheduler(Protocol):
    """Starts jobs and says which are still there; what is complete, records tell."""

    @property
    def slots(self) -> int:
        """How many workers may run at once."""

    def submit(self, job: Job) -> list[str]:
        """Submit an array and return its task ids in task order."""

    def find(self, name: str) -> list[str] | None:
        """Return the task ids of an array submitted under `name`, or None if there is none.

        Raises:
            SchedulerUnreachable: it cannot be said now.
        """

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the state of every task; one query whatever their number."""

    def reasons(self, ids: Sequence[str]) -> dict[str, str]:
        """Return why tasks that are gone ended, where it is known."""

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks; those that are gone are passed over."""

    def wait(self, seconds: float) -> None:
        """Return when something may have happened, at the latest after `seconds`."""

    def close(self) -> None:
        """End what belongs to this process; jobs of a cluster go on."""
