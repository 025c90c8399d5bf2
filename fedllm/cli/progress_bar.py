"""Progress of a command on stderr: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ProgressLines:
    """Progress as lines, at most one in `pause_seconds`; short work prints none."""

    def __init__(self, pause_seconds: float = 10.0) -> None:
        self._pause_seconds = pause_seconds
        self._began = self._last = time.monotonic()

    def report(self, done: int, total: int) -> None:
        """Write a line unless the last one is too recent."""
        now = time.monotonic()
        if now - self._last >= self._pause_seconds:
            self._last = now
            sys.stderr.write(f"{done} of {total} modules after {now - self._began:.0f} s\n")
            sys.stderr.flush()


@contextmanager
def modules_done() -> Iterator[Callable[[int, int], None]]:
    """Give a function that reports progress: modules done, and their total."""
    if not sys.stderr.isatty():
        yield ProgressLines().report
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("modules", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
