"""The one narrow seam between a run and whatever starts its jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from fedllm.errors import Incomplete, UserError
from fedllm.planning.capacity import Capacity as Capacity
from fedllm.planning.capacity import Limits as Limits
from fedllm.storage.records import EndingRecord

Program = Literal["prepare", "client", "aggregate", "evaluate"]
Option = str | int | float | bool | None


# how a task ended: the scheduler says it, the outcome of an attempt keeps it; `endings` reads it
Ending: TypeAlias = EndingRecord


class SchedulerUnreachable(Incomplete):
    """The scheduler does not answer now; asking again later may help."""


class SchedulerFull(Incomplete):
    """The limits on submitted jobs leave no room now; it was not submitted."""


class SubmissionUnknown(UserError):
    """Nobody says whether it was submitted: its name is looked for, and it is not sent again."""

    def kept_in(self, record: Path) -> "SubmissionUnknown":
        """Return this error with the record that keeps the job from being sent again."""
        return SubmissionUnknown(
            f"{self}; it is not sent again: once you are sure that there is no such job, remove "
            f"{record}"
        )


class TaskState(Enum):
    """What is known of a task."""

    WAITING = "waiting"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"


class EndReason(Enum):
    """Why a task ended that did not end well, whatever its scheduler calls it."""

    PREEMPTED = "preempted"
    NODE_LOST = "node lost"
    OUT_OF_MEMORY = "out of memory"
    TIME_LIMIT = "time limit"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Job:
    """An array of identical tasks: `tasks` times `program argv`, at most `parallel` at once.

    `worker_class` is whose bundles its workers take; None: it is a job of one task.

    A task is `processes_per_task` times the program, evenly over `nodes_per_task` nodes. A signal
    to a task reaches all its processes. It ends when all have ended; one that fails ends the rest.
    """

    name: str
    program: Program
    argv: tuple[str, ...]
    log_folder: Path
    worker_class: str | None = None
    tasks: int = 1
    parallel: int | None = None
    processes_per_task: int = 1
    nodes_per_task: int = 1
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.processes_per_task % self.nodes_per_task == 0, "nodes of unequal parts"


class Scheduler(Protocol):
    """Starts jobs and says which are still there; what is complete, records tell."""

    def capacity(self, options: Mapping[str, Option]) -> Capacity:
        """Return what there is room for, for tasks of these options, as far as it is known."""

    def room(self, options: Mapping[str, Option]) -> int | None:
        """Return how many tasks may be submitted now; None: no limit is known."""

    def limits(self, options: Mapping[str, Option]) -> Limits:
        """Return what may be submitted at all, for tasks of these options."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Ask whether jobs could be submitted as they are; submit nothing.

        Raises:
            ConfigError: not all of them; one line per problem, each names its key.
            SchedulerUnreachable: it cannot be said now.
        """

    def submit(self, job: Job) -> list[str]:
        """Submit an array and return its task ids in task order.

        Raises:
            ConfigError: it is refused; the message names the key.
            SchedulerFull: limits on submitted jobs leave no room now.
            SchedulerUnreachable: no answer; whether it was taken is unknown.
            SubmissionUnknown: an answer, and still unknown.
        """

    def script(self, job: Job) -> str | None:
        """Return the text that `submit` would hand to the batch system; None: there is none."""

    def find(self, name: str) -> list[str] | None:
        """Return the task ids of an array submitted under `name`, or None if there is none.

        Raises:
            SchedulerUnreachable: it cannot be said now.
        """

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the state of every task; one query whatever their number."""

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended that did not end well, where it is known."""

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Return what tasks that wait are waiting for, from the last answer about states."""

    def trouble(self) -> str | None:
        """Return why states are unknown now, in one sentence, or None if they are known."""

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks; those that are gone are passed over."""

    def wait(self, seconds: float) -> None:
        """Return when something may have happened, at the latest after `seconds`."""

    def close(self) -> None:
        """End what belongs to this process; jobs of a cluster go on."""
