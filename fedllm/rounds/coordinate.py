"""The resident coordinator: advance until the run is done."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fedllm.errors import Incomplete
from fedllm.rounds.advance import advance
from fedllm.rounds.aggregating import redo_damaged_state
from fedllm.rounds.opening import close_run
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import SchedulerUnreachable

_LONGEST_WAIT_SECONDS = 300.0


def coordinate(run: Run) -> None:
    """Advance a run to its end, then close it.

    Raises:
        FedllmError: it cannot go on.
        Incomplete: it was told to stop; resume goes on.
    """
    with _stopping_on_signals():
        try:
            redo_damaged_state(run)
            _advance_to_the_end(run)
        finally:
            close_run(run)


def advance_once(run: Run) -> bool:
    """Advance a run by what is possible now, then close it; say whether it is done."""
    try:
        redo_damaged_state(run)
        return advance(run)
    finally:
        close_run(run)


def _advance_to_the_end(run: Run) -> None:
    unreachable_seconds = run.config.scheduler.poll_seconds
    while True:
        try:
            if advance(run):
                return
            unreachable_seconds = run.config.scheduler.poll_seconds
            run.scheduler.wait(run.config.scheduler.poll_seconds)
        except SchedulerUnreachable as error:
            run.say(f"{error}; asking again in {unreachable_seconds:.0f} s")
            run.scheduler.wait(unreachable_seconds)
            unreachable_seconds = min(2 * unreachable_seconds, _LONGEST_WAIT_SECONDS)


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Turn the first SIGTERM or Ctrl-C into an orderly end; further ones do not disturb it."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        name = signal.Signals(number).name
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise Incomplete(f"stopped by {name}; `fedllm resume` goes on")

    handled = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Callable[..., object] | int | None] = {}
    for number in handled:
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number] or signal.SIG_DFL)
