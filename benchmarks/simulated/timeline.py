"""Virtual time: things that happen in order, as fast as they can be computed."""

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timeline:
    """A clock that moves only when told to, and what happens on the way; in seconds from 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have `action` happen in so long."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def pass_seconds(self, seconds: float) -> None:
        """Move on; all that is due happens at its own moment."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = until


@contextmanager
def virtual_clock(timeline: Timeline) -> Iterator[None]:
    """Make `time.monotonic` tell virtual time: whoever waits for minutes waits for those."""
    before = time.monotonic
    # 1e6: nothing may rely on a clock that starts at 0
    time.monotonic = lambda: 1e6 + timeline.now
    try:
        yield
    finally:
        time.monotonic = before
