"""How far a command is, on stderr: a bar on a terminal, now and then a line in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lines:
    """Progress as lines, the first one after `pause_seconds`: short work says nothing."""

    def __init__(self, pause_seconds: float = 10.0) -> None:
        self._pause_seconds = pause_seconds
        self._began = self._last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        """Write a line unless the last one is too recent."""
        now = time.monotonic()
        if now - self._last >= self._pause_seconds:
            self._last = now
            sys.stderr.write(f"{done} of {total} modules after {now - self._began:.0f} s\n")
            sys.stderr.flush()


@contextmanager
def modules_done() -> Iterator[Callable[[int, int], None]]:
    """Give what is to be told how many modules are done, of how many."""
    if not sys.stderr.isatty():
        yield Lines().tell
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("modules", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
