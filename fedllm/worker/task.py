"""A worker from attempt to attempt: who it is, what it may take, and when it has to end."""

import time
from dataclasses import dataclass, field

from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.records import ArrayRecord, SubmissionRecord
from fedllm.worker.process_group import OneProcess, Processes

# For what a worker does after its last bundle, and for Slurm's clock, which began before ours.
_MARGIN_SECONDS = 90.0
_MARGIN_SHARE = 0.15


@dataclass(kw_only=True)
class WorkerTask:
    """One task; moments are of `time.monotonic`.

    Attributes:
        worker_class: whose bundles it takes; None: all.
        began: when its process began, or was given this task.
        processes: those that it is.
        array: the array that it belongs to, where it is known.
        stepped: whether this start of it took a training step.
    """

    identity: TaskIdentity
    worker_class: str | None
    session: Session
    signals: StopSignals
    began: float = field(default_factory=time.monotonic)
    processes: Processes = field(default_factory=OneProcess)
    array: ArrayRecord | None = None
    stepped: bool = False

    def agree(self, *, due: bool) -> tuple[bool, bool]:
        """Agree with all processes of the task, before each step, on what is done before it.

        Args:
            due: whether clients are to be saved, as far as this process knows.

        Returns:
            Whether to stop, since a signal came to any of them, and whether to save.
        """
        *came, due = self.processes.any_of([*self.signals.flags, due])
        self.signals.hear(came)
        return any(came), due

    def seconds_left(self) -> float | None:
        """Return how long it may still take up work; None: there is no limit."""
        if self.array is None or self.array.minutes is None:
            return None
        limit = 60.0 * self.array.minutes
        margin = min(_MARGIN_SECONDS, _MARGIN_SHARE * limit)
        return max(0.0, limit - margin - (time.monotonic() - self.began))


def array_of(
    plan: SubmissionRecord, worker_class: str | None, identity: TaskIdentity
) -> ArrayRecord | None:
    """Return the array of a task: the one it is named after, else the shortest of its class."""
    of_class = [array for array in plan.arrays if array.worker_class == worker_class]
    for array in of_class:
        if array.name == identity.array:
            return array
    return min(of_class, key=lambda array: array.minutes or float("inf"), default=None)
