"""The task of a worker, from attempt to attempt: identity, class, processes and time limit."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths
from fedllm.storage.records import ArrayRecord, SubmissionRecord
from fedllm.worker.process_group import OneProcess, Processes

# For the work after the last bundle, and because Slurm's clock started before ours.
_MARGIN_SECONDS = 90.0
_MARGIN_SHARE = 0.15


@dataclass(kw_only=True)
class WorkerTask:
    """A task that works as a worker; moments are of `time.monotonic`.

    Attributes:
        worker_class: the class whose bundles it takes; None: all.
        began: when its process began, or took up this task.
        processes: the processes of the task.
        array: the Slurm array of the task; None: unknown.
        stepped: whether this start of the task took a training step.
        clients_trained: how many clients its processes have trained, since they began.
        attempt: the attempt on which it works now.
        on_attempt: called with every further attempt on which it works.
    """

    identity: TaskIdentity
    worker_class: str | None
    session: Session
    attempt: AttemptPaths
    signals: StopSignals
    began: float = field(default_factory=time.monotonic)
    processes: Processes = field(default_factory=OneProcess)
    array: ArrayRecord | None = None
    stepped: bool = False
    clients_trained: int = 0
    on_attempt: Callable[[AttemptPaths], None] = lambda _attempt: None

    def __post_init__(self) -> None:
        """Know that processes which replace others go on after steps."""
        self.stepped |= self.identity.renewed_at is not None

    @property
    def is_used_up(self) -> bool:
        """Whether its processes have trained as many clients as they may: new ones go on.

        A single process forms no group with others, and stays.
        """
        most = self.session.config(self.attempt.run).training.zero.restart_after_clients
        return self.identity.num_processes > 1 and self.clients_trained >= most

    def go_on(self, attempt: AttemptPaths) -> None:
        """Work on another attempt from now on."""
        self.attempt = attempt
        self.on_attempt(attempt)

    def agree(self, *, due: bool) -> tuple[bool, bool]:
        """Agree with all processes of the task, before a step, whether to stop and whether to save.

        Args:
            due: whether this process knows that checkpoints are due.

        Returns:
            Whether to stop, since a signal came to any process; whether to save.
        """
        *came, due = self.processes.any_of([*self.signals.flags, due])
        self.signals.hear(came)
        return any(came), due

    def seconds_left(self) -> float | None:
        """Return the seconds that its next bundle may take; None: there is no limit."""
        if self.array is None or self.array.minutes is None:
            return None
        limit = 60.0 * self.array.minutes
        margin = min(_MARGIN_SECONDS, _MARGIN_SHARE * limit)
        return max(0.0, limit - margin - (time.monotonic() - self.began))


def array_of(
    plan: SubmissionRecord, worker_class: str | None, identity: TaskIdentity
) -> ArrayRecord | None:
    """Return the array that a task's identity names, else the shortest one of its class."""
    of_class = [array for array in plan.arrays if array.worker_class == worker_class]
    for array in of_class:
        if array.name == identity.array:
            return array
    return min(of_class, key=lambda array: array.minutes or float("inf"), default=None)
