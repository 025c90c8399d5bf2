"""Signals that tell a worker to come to an end. Light: it is imported before all else."""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Self

# The warning before the end of a job's time, or of its preemption: `scheduler.sbatch.client.signal`
# names one. USR2 is the default: NCCL may catch USR1.
WARNINGS = (signal.SIGUSR2, signal.SIGUSR1)
# TERM: `scancel`, preemption without a warning signal, a local coordinator that closes.
_HANDLED = (signal.SIGTERM, *WARNINGS)


class StopSignals:
    """Notes that a signal came, for the block; what the caller's own handler wants happens after.

    Outside the main thread Python takes no handlers: then nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._all: set[int] = set()
        self._heard: set[int] = set()
        self._before: dict[int, object] = {}

    @property
    def came(self) -> bool:
        """Whether one of the signals came."""
        return self.received is not None

    @property
    def only_warned(self) -> bool:
        """Whether a warning came, and nothing that asked for the end itself."""
        return self.came and self._all | self._heard <= set(WARNINGS)

    @property
    def flags(self) -> list[bool]:
        """Which signals came, one flag for each that is noted."""
        return [number in self._all for number in _HANDLED]

    def hear(self, flags: Sequence[bool]) -> None:
        """Note what came to any process of the task, by their flags."""
        for number, flag in zip(_HANDLED, flags, strict=True):
            if flag and number not in self._all:
                self._heard.add(number)
                self.received = self.received or number

    @property
    def name(self) -> str:
        """The name of the signal that came first."""
        return signal.Signals(self.received).name if self.received is not None else "none"

    def __enter__(self) -> Self:
        """Take over the signals."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _HANDLED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back, and pass on what came to handlers of the caller."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
        for number in self._all:
            if callable(self._before.get(number)):
                os.kill(os.getpid(), number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._all.add(number)
        if self.received is None:
            self.received = number
