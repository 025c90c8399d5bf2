"""The interface between a run and the scheduler that starts its jobs; no word of Slurm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from fedllm.errors import Incomplete, RunFailed, UserError
from fedllm.planning.capacity import ONE_PROCESS as ONE_PROCESS
from fedllm.planning.capacity import Capacity as Capacity
from fedllm.planning.capacity import Limits as Limits
from fedllm.planning.capacity import TaskSize as TaskSize
from fedllm.storage.records import EndingRecord

Program = Literal["prepare", "client", "aggregate", "evaluate"]
Option = str | int | float | bool | None


# how a task ended: reported by the scheduler, kept in the outcome of an attempt, read by `endings`
Ending: TypeAlias = EndingRecord


class SchedulerUnreachable(Incomplete):
    """The scheduler does not answer now; it may answer later."""


class SchedulerFull(Incomplete):
    """The limits on submitted jobs leave no room now; the job was not submitted."""


class CancelRefused(RunFailed):
    """The scheduler refused to end tasks, which run on; they may be another user's."""


class SubmissionUnknown(UserError):
    """A job may or may not have been submitted; it is looked up by name and not sent again."""

    def kept_in(self, record: Path) -> "SubmissionUnknown":
        """Return this error with the record that keeps the job from being sent again."""
        return SubmissionUnknown(
            f"{self}; it is not sent again: once you are sure that there is no such job, remove "
            f"{record}"
        )


class TaskState(Enum):
    """The state of a task as far as the scheduler knows it.

    A suspended task stands still until the scheduler or an admin lets it go on.
    """

    WAITING = "waiting"
    RUNNING = "running"
    SUSPENDED = "suspended"
    GONE = "gone"
    UNKNOWN = "unknown"


class EndReason(Enum):
    """Reason why a task failed, the same words for every scheduler."""

    PREEMPTED = "preempted"
    NODE_LOST = "node lost"
    OUT_OF_MEMORY = "out of memory"
    TIME_LIMIT = "time limit"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Job:
    """An array of identical tasks: `tasks` times `program argv`, at most `parallel` at once.

    `worker_class` is the class whose bundles its workers take; None: the job has one task.

    A task runs the program in `processes_per_task` processes, spread evenly over `nodes_per_task`
    nodes. A signal to a task reaches all its processes. The task ends when all have ended; a
    process that fails ends the others.
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
    """Scheduler of jobs: it starts them and says which still run. Records say what is complete."""

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        """Return how many tasks of these options and size it can take, as far as it is known."""

    def room(self, options: Mapping[str, Option]) -> int | None:
        """Return how many tasks may be submitted now; None: no limit is known."""

    def limits(self, options: Mapping[str, Option]) -> Limits:
        """Return the limits on what may be submitted, for tasks of these options."""

    def check(self, jobs: Sequence[Job]) -> None:
        """Check that jobs could be submitted as they are; submit nothing.

        Raises:
            ConfigError: some could not; one line per problem, each names its key.
            SchedulerUnreachable: the scheduler does not answer now.
        """

    def submit(self, job: Job) -> list[str]:
        """Submit an array and return its task ids in task order.

        Raises:
            ConfigError: the scheduler refuses it; the message names the key.
            SchedulerFull: limits on submitted jobs leave no room now.
            SchedulerUnreachable: no answer; the array may or may not have been submitted.
            SubmissionUnknown: the answer does not say whether the array was submitted.
        """

    def script(self, job: Job) -> str | None:
        """Return the script that `submit` would give to the batch system; None: it gives none."""

    def find(self, name: str) -> list[str] | None:
        """Return the task ids of an array submitted under `name`, or None if there is none.

        Raises:
            SchedulerUnreachable: the scheduler does not answer now.
        """

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the state of every task; one query for all."""

    def attribute(self, ids: Sequence[str], user: int) -> None:
        """Remember the user, by number, who submitted tasks: it may hide those of others."""

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended, for those that failed and whose end is known."""

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the reasons why tasks wait, from the last answer about states."""

    def trouble(self) -> str | None:
        """Return why states are unknown now, in one sentence; None: they are known."""

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        """End tasks, or only those of them that still wait; tasks that are gone are ignored.

        Raises:
            CancelRefused: some may not be ended by this user.
            SchedulerUnreachable: the scheduler does not answer now.
        """

    def wait(self, seconds: float) -> None:
        """Wait until something may have happened, at most `seconds`."""

    def close(self) -> None:
        """End the processes that this one started; jobs of a cluster go on."""
