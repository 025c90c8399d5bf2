"""The training job: a worker claims bundle after bundle of an attempt and trains their clients."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from fedllm.config.models import Config
from fedllm.errors import FedllmError, ProcessLost, UserError, counted
from fedllm.process.late_files import read_late_file
from fedllm.process.log import say
from fedllm.process.renewal import ANEW
from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskEnvironment, TaskIdentity
from fedllm.scheduling.slurm.requeue import requeue
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import AttemptPaths
from fedllm.storage.records import ErrorRecord, SubmissionRecord
from fedllm.worker.bundle import BundleTraining, is_over
from fedllm.worker.claims import Claims, smallest_cost
from fedllm.worker.following import follow
from fedllm.worker.heartbeat import Heartbeat, State
from fedllm.worker.idle import may_idle, next_attempt
from fedllm.worker.process_group import connected
from fedllm.worker.task import WorkerTask, array_of

_WAIT_SHARE = 0.75  # of `scheduler.hung_minutes`, after which the task is cancelled
STOPPED = 3  # exit code after a signal: another start or attempt continues the work


def work(
    attempt: AttemptPaths,
    worker_class: str | None,
    identity: TaskIdentity,
    session: Session,
    *,
    signals: StopSignals | None = None,
    began: float | None = None,
    on_attempt: Callable[[AttemptPaths], None] = lambda _attempt: None,
) -> int:
    """Work on an attempt until no bundle of a class is left, or a signal comes.

    Every finished client is published, whatever ends the worker. With `scheduler.linger_minutes`
    the worker then waits idle for later attempts and rounds. If the task has several processes,
    the first one does all this, and the others take part in the training.

    Args:
        attempt: the first attempt.
        worker_class: the class whose bundles it takes; None: all.
        identity: the task.
        session: the loaded base model and data.
        signals: the caller's record of signals; None: signals are noted from now on.
        began: when its time began to count, of `time.monotonic`; None: now.
        on_attempt: called with every later attempt that it begins to work on.

    Returns:
        The exit code: 0, or `STOPPED` after a signal that left work undone; or `ANEW`: all
        processes of the task are to begin anew, since they have trained as many clients as they
        may.

    Raises:
        FedllmError: the attempt cannot be worked on, for example a damaged server state.
    """
    task = WorkerTask(
        identity=identity,
        worker_class=worker_class,
        session=session,
        attempt=attempt,
        signals=signals or StopSignals(),
        began=time.monotonic() if began is None else began,
        on_attempt=on_attempt,
    )
    minutes = _wait_minutes(session.config(attempt.run))

    def tell(loss: ProcessLost) -> None:
        # the process that is lost may have recorded the reason already
        with suppress(FedllmError, OSError):
            record = ErrorRecord.of(loss, log=loss.log)
            record.publish_once(task.attempt.task_error(identity.task))

    with (
        _task_of(session),
        nullcontext() if signals else task.signals,
        connected(identity, wait_minutes=minutes, tell=tell) as processes,
    ):
        task.processes = processes
        if not identity.is_first:
            return follow(task)
        exit_code = _lead(task, attempt)
        processes.dismiss(exit_code)
        return exit_code


def _wait_minutes(config: Config) -> float:
    """Return how long processes wait for each other: the coordinator would wait longer."""
    return _WAIT_SHARE * config.scheduler.hung_minutes


@contextmanager
def _task_of(session: Session) -> Iterator[None]:
    """Let the session know when a task has ended."""
    try:
        yield
    finally:
        session.end_task()


def _lead(task: WorkerTask, attempt: AttemptPaths) -> int:
    """Work on one attempt after the other; return the exit code."""
    worker = Worker.open(task, attempt, since=task.began)
    task.array = array_of(worker.plan, task.worker_class, task.identity)
    while True:
        worker.work()
        if task.signals.came:
            return _stop(worker)
        if worker.is_to_begin_anew:
            name, count = task.identity.task, task.clients_trained
            say(f"{name}: new processes go on, after {counted(count, 'client')}")
            return ANEW
        if not worker.stays_idle:
            return 0
        since = time.monotonic()
        later = next_attempt(
            task, worker.attempt, need_seconds=smallest_cost(worker.claims.bundles)
        )
        if later is None:
            worker.note("ended")
            return 0
        task.go_on(later)
        worker = Worker.open(task, later, since=since)


@dataclass(kw_only=True)
class Worker:
    """A task that works on one attempt."""

    task: WorkerTask
    attempt: AttemptPaths
    plan: SubmissionRecord
    claims: Claims
    heartbeat: Heartbeat
    is_unfinished: bool = False

    @classmethod
    def open(cls, task: WorkerTask, attempt: AttemptPaths, *, since: float) -> "Worker":
        """Read the plan of an attempt, and the record of an earlier start of this task.

        Raises:
            UserError: it has no bundle of the worker's class.
        """
        visibility_seconds = traits_of(task.session.config(attempt.run)).visibility_seconds
        plan = read_late_file(lambda: SubmissionRecord.read(attempt.submission), visibility_seconds)
        classes = {bundle.worker_class for bundle in plan.bundles}
        if task.worker_class is not None and task.worker_class not in classes:
            raise UserError(
                f"{attempt.submission}: no bundle of class {task.worker_class}; "
                f"need one of {', '.join(sorted(classes))}"
            )
        heartbeat = Heartbeat.open(
            attempt, task.identity, task.worker_class or "", began=since, first=task.began
        )
        restarted = heartbeat.earlier is not None
        return cls(
            task=task,
            attempt=attempt,
            plan=plan,
            claims=Claims(attempt, plan, task.worker_class, task.identity, restarted=restarted),
            heartbeat=heartbeat,
        )

    @property
    def stays_idle(self) -> bool:
        """Whether it waits idle when no bundle is left; a task of a single bundle does not."""
        config = self.task.session.config(self.attempt.run)
        return may_idle(config) and not self.plan.one_bundle

    @property
    def has_work_left(self) -> bool:
        """Whether its bundle is unfinished, or another one is left for it."""
        return self.is_unfinished or (not is_over(self.attempt) and self.claims.is_any_left())

    def work(self) -> None:
        """Claim bundles and train their clients until none is left that fits, or a signal comes.

        A worker that starts after the attempt is over writes nothing.
        """
        if is_over(self.attempt):
            return
        self.note("starting")
        signals = self.task.signals
        with ExitStack() as stack:
            training: BundleTraining | None = None
            while not (signals.came or self.task.is_used_up or is_over(self.attempt)) and (
                claimed := self.claims.next(self._seconds_left())
            ):
                if training is None:
                    opened = BundleTraining.open(self.task, self.attempt, self.heartbeat, claimed)
                    training = stack.enter_context(closing(opened))
                self.is_unfinished = not training.train(claimed)
        self.note(self._state_after())

    @property
    def is_to_begin_anew(self) -> bool:
        """Whether new processes of this task are to go on with what is left."""
        return self.task.is_used_up and self.has_work_left

    def _state_after(self) -> State:
        if self.task.signals.came:
            return "ended"
        if self.is_to_begin_anew:
            return "starting"
        return "lingering" if self.stays_idle else "ended"

    def note(self, state: State) -> None:
        """Write the task's record."""
        self.heartbeat.write(state)

    def _seconds_left(self) -> float | None:
        """Return the seconds that the next bundle may take.

        The first one has no limit: a task with little time would never begin.
        """
        return self.task.seconds_left() if self.task.stepped else None


def _stop(worker: Worker) -> int:
    """Log the signal that stopped a worker, and requeue its task if only its time is over."""
    task, signals = worker.task.identity.task, worker.task.signals
    if not worker.has_work_left:
        return 0
    say(f"{task}: stopped by {signals.name}; finished clients are published")
    if signals.only_warned and TaskEnvironment().is_array_task(task):
        # with a time limit that is too short for one step it would be requeued for ever
        problem = requeue(task) if worker.task.stepped else "no step was taken since it started"
        again = f"not requeued ({problem}); the next attempt goes on" if problem else "requeued"
        say(f"{task}: {again}")
    return STOPPED
