"""Progress of a command on stderr: a bar on a terminal, a line now and then in a log."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedllm.reporting.status.live_lines import LiveLine, fitted
from fedllm.storage.kept_records import Count


@contextmanager
def progress_bar() -> Iterator[Count]:
    """Give a function that shows what is counted: how many are done, of how many, and the rate."""
    from fedllm.process.meter import Meter

    meter = Meter()
    if not sys.stderr.isatty():
        yield meter.count
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    with Live(console=console, transient=True, vertical_overflow="crop") as live:

        def count(what: str, done: int, total: int) -> None:
            numbers = meter.noted(what, done, total).numbers
            line = LiveLine(label=f"{what} ", share=done / max(1, total), words=numbers)
            label, bar, words = fitted(line, console.width - 1)
            text = Text(no_wrap=True, overflow="crop").append(label, "bold").append(bar, "cyan")
            live.update(text.append(f" {words}" if bar else words))

        yield count
