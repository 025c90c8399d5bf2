"""Live view of a run or a sweep: redrawn on a terminal, elsewhere a line for every change."""

import sys
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from fedllm.cli.options import folded, relative_paths, say_with_paths
from fedllm.reporting.status.status import FAILED
from fedllm.reporting.tables import terminal_columns

REDRAW_SECONDS = 3.0
_ENDED = {"done", FAILED}


class Watched(Protocol):
    """A status that ends."""

    @property
    def state(self) -> str:
        """`done` or `failed` once nothing more will change by itself."""


S = TypeVar("S", bound=Watched)


def watch(read: Callable[[], S], text: Callable[[S], str], line: Callable[[S], str]) -> None:
    """Show the status of a run or a sweep until it is done or failed, or until Ctrl-C.

    Args:
        read: reads the status.
        text: formats it in full, for a terminal.
        line: formats it in one line, for a log.
    """
    show = _redraw if sys.stdout.isatty() else _print_changes
    try:
        show(read, text if sys.stdout.isatty() else line)
    except KeyboardInterrupt:
        return


def _redraw(read: Callable[[], S], text: Callable[[S], str]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # names come from the user: read no markup in them
    console = Console(markup=False, highlight=False, emoji=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            status = read()
            shown = folded(relative_paths(text(status)), terminal_columns())
            live.update(Text(shown, no_wrap=True, overflow="crop"), refresh=True)
            if status.state in _ENDED:
                return
            time.sleep(REDRAW_SECONDS)


def _print_changes(read: Callable[[], S], line: Callable[[S], str]) -> None:
    last = ""
    while True:
        status = read()
        if (now := line(status)) != last:
            say_with_paths(f"{time.strftime('%H:%M:%S')} {now}")
            last = now
        if status.state in _ENDED:
            return
        time.sleep(REDRAW_SECONDS)
