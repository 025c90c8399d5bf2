"""Coordinator: advance a run until it is done, or until it must wait for jobs."""

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fedllm.errors import FedllmError, Stopped
from fedllm.planning.backoff import Backoff
from fedllm.rounds.advance import advance
from fedllm.rounds.aggregating import redo_damaged_state
from fedllm.rounds.dispatch.in_flight import InFlight, find_in_flight
from fedllm.rounds.failing import ASKED_AGAIN, recorded_failure
from fedllm.rounds.opening import close_run
from fedllm.rounds.run import Run
from fedllm.scheduling.patience import Patience
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import shown_path
from fedllm.storage.record_cache import rare_garbage_collection

LONGEST_WAIT_SECONDS = 300.0
# times `storage.visibility_seconds`: how long the file system may refuse before the run stops
PATIENCE = 5


def coordinate(run: Run) -> None:
    """Advance a run to its end, then close it.

    Raises:
        FedllmError: the run cannot go on.
        Stopped: a signal stopped it; resume goes on.
    """
    with stopping_on_signals(), rare_garbage_collection():
        try:
            with recorded_failure(run):
                _advance_to_the_end(run)
        except Stopped as stopped:
            raise _explained(run, stopped) from stopped
        finally:
            _close(run)


def _close(run: Run) -> None:
    """Close a run; on a second Ctrl-C, at once.

    Raises:
        Stopped: it says how to go on.
    """
    try:
        close_run(run)
    except Stopped as again:
        raise Stopped(
            f"{again}, at once; what workers published is kept; {_resume(run)}"
        ) from again


def _resume(run: Run) -> str:
    return f"go on with: fedllm resume {shlex.quote(shown_path(run.paths.root))}"


def advance_while_possible(run: Run) -> InFlight | None:
    """Take every step that is possible without waiting for jobs, then close the run.

    It waits only for missing files that the file system may still show: the next coordinator would
    have to start this wait again.

    Returns:
        The tasks in flight, or None if the run is done.
    """
    try:
        with recorded_failure(run):
            return _advance_until_jobs(run)
    finally:
        close_run(run)


def patience_of(run: Run) -> Patience:
    """Return the patience with the run's file system; trying again changes nothing."""
    return Patience(seconds=PATIENCE * run.config.storage.visibility_seconds, say=run.say)


def _advance_until_jobs(run: Run) -> InFlight | None:
    patience = patience_of(run)
    patience.retry(lambda: redo_damaged_state(run))
    while not patience.retry(lambda: advance(run)):
        in_flight = patience.retry(lambda: find_in_flight(run))
        if in_flight.waits_for_room or (in_flight.tasks and not run.known_records.is_waiting):
            return in_flight
        run.scheduler.wait(run.config.scheduler.poll_seconds)
    return None


def _advance_to_the_end(run: Run) -> None:
    pause = Backoff(run.config.scheduler.poll_seconds, max_seconds=LONGEST_WAIT_SECONDS)
    patience = patience_of(run)
    patience.retry(lambda: redo_damaged_state(run))
    trouble: str | None = None
    while True:
        try:
            if patience.retry(lambda: advance(run)):
                return
        except ASKED_AGAIN as error:
            run.say(f"{error}; asking again in {pause.seconds:.0f} s")
            run.scheduler.wait(pause.seconds)
            pause.fail()
            continue
        pause.succeed()
        trouble = _log_trouble(run, trouble)
        run.scheduler.wait(pause_seconds(run))


def _explained(run: Run, stopped: Stopped) -> Stopped:
    """Say what is being finished; return the error with what goes on, and how to go on."""
    name = shlex.quote(shown_path(run.paths.root))
    if not traits_of(run.config).jobs_outlive_coordinator:
        run.say(
            f"{stopped}: workers publish the clients that they have finished, in at most half a "
            f"minute{'; Ctrl-C again ends them at once' if 'Ctrl-C' in str(stopped) else ''}"
        )
        return Stopped(f"{stopped}, and nothing is lost; {_resume(run)}")
    return Stopped(
        f"{stopped}; {_left_in_queue(run)} (fedllm cancel {name} ends them); {_resume(run)}"
    )


def _left_in_queue(run: Run) -> str:
    try:
        tasks = len(find_in_flight(run).tasks)
    except FedllmError:
        return "jobs may go on without the coordinator"
    return f"{tasks} {'task goes' if tasks == 1 else 'tasks go'} on without the coordinator"


def pause_seconds(run: Run) -> float:
    """Return the seconds until the next look, so that at most 1 % of a long training is lost."""
    section = run.config.scheduler
    trained = run.observations.training_seconds or 0.0
    return max(section.poll_seconds, min(section.query_seconds, trained / 100))


def _log_trouble(run: Run, before: str | None) -> str | None:
    """Log when the scheduler stops answering about tasks and when it answers again; return why."""
    trouble = run.scheduler.trouble()
    if trouble and not before:
        run.say(f"{trouble}; until then tasks count as running")
    elif before and not trouble:
        run.say("the scheduler answers again")
    return trouble


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise Stopped on SIGTERM, Ctrl-C and a second Ctrl-C; ignore all later ones."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if received != [signal.SIGINT]:
            # it ends in order, as soon as it can
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {'Ctrl-C' if number == signal.SIGINT else name}")

    handled = (signal.SIGTERM, signal.SIGINT)
    received: list[int] = []
    before: dict[int, Callable[..., object] | int | None] = {}
    for number in handled:
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number] or signal.SIG_DFL)
