"""Progress of a command on stderr: a bar on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedllm.storage.kept_records import Count


@contextmanager
def progress_bar() -> Iterator[Count]:
    """Give a function that shows what is counted, how many are done, and of how many."""
    if not sys.stderr.isatty():
        from fedllm.process.meter import Meter

        yield Meter().count
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def count(what: str, done: int, total: int) -> None:
            if progress.tasks[0].description != what:
                progress.reset(task, description=what)
            progress.update(task, completed=done, total=total)

        yield count
