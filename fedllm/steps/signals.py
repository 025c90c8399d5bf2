"""Signals that tell a worker to come to an end."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

# TERM: preemption, `scancel`, a local coordinator that closes. USR2: the warning before the end
# of a job's time; NCCL may catch USR1.
_HANDLED = (signal.SIGTERM, signal.SIGUSR2)


class StopSignals:
    """Notes that a signal came, for the block; what the caller's own handler wants happens after.

    Outside the main thread Python takes no handlers: then nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    @property
    def came(self) -> bool:
        """Whether one of the signals came."""
        return self.received is not None

    @property
    def name(self) -> str:
        """The name of the signal that came."""
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
        """Give the signals back, and pass on one that came to a handler of the caller."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
        if self.received is not None and callable(self._before.get(self.received)):
            os.kill(os.getpid(), self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
