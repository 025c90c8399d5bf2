"""Signals that tell a worker to stop. Imported before all else, so it imports little."""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Self

# Warnings before a job's time limit or preemption; `scheduler.sbatch.client.signal` names one.
# USR2 is the default: NCCL may catch USR1.
WARNINGS = (signal.SIGUSR2, signal.SIGUSR1)
# TERM: `scancel`, preemption without a warning signal, a local coordinator that closes.
# INT: Ctrl-C where a worker runs in the terminal; a second one ends it at once.
_HANDLED = (signal.SIGTERM, signal.SIGINT, *WARNINGS)


class StopSignals:
    """Signals received during a `with` block; the caller's own handlers get them after it.

    Outside the main thread Python allows no handlers, and no signal is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._all: set[int] = set()
        self._heard: set[int] = set()
        self._before: dict[int, object] = {}

    @property
    def came(self) -> bool:
        """Whether any of the signals came."""
        return self.received is not None

    @property
    def only_warned(self) -> bool:
        """Whether only warnings came, and no signal that ends the task."""
        return self.came and self._all | self._heard <= set(WARNINGS)

    @property
    def flags(self) -> list[bool]:
        """One flag for each handled signal: whether it came."""
        return [number in self._all for number in _HANDLED]

    def hear(self, flags: Sequence[bool]) -> None:
        """Note the signals that came to any process of the task, from their flags."""
        for number, flag in zip(_HANDLED, flags, strict=True):
            if flag and number not in self._all:
                self._heard.add(number)
                self.received = self.received or number

    def leave_to_next(self) -> None:
        """Leave the signals that came, and those to come, to the program that replaces this one.

        They wait until that one notes signals.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        for number in self._all:
            # to this thread: another one would take it, and end with this program
            signal.pthread_kill(threading.get_ident(), number)

    @property
    def name(self) -> str:
        """The name of the signal that came first."""
        return signal.Signals(self.received).name if self.received is not None else "none"

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _HANDLED}
            # those that the process before this one left
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the old handlers, and send them the signals that came."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
        for number in self._all:
            if callable(self._before.get(number)):
                os.kill(os.getpid(), number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and number in self._all:
            raise KeyboardInterrupt
        self._all.add(number)
        if self.received is None:
            self.received = number
