"""A run watched until it is done: redrawn on a terminal, a line for every change in a log."""

import sys
import time
from collections.abc import Callable

from fedllm.cli.options import say
from fedllm.reporting.status.status import RunStatus

REDRAW_SECONDS = 3.0


def watch(
    read: Callable[[], RunStatus],
    text: Callable[[RunStatus], str],
    line: Callable[[RunStatus], str],
) -> None:
    """Show where a run stands until it is done, or until Ctrl-C.

    Args:
        read: reads where it stands now.
        text: says it in full, for a terminal.
        line: says it in a line, for a log.
    """
    show = _redraw if sys.stdout.isatty() else _tell_changes
    try:
        show(read, text if sys.stdout.isatty() else line)
    except KeyboardInterrupt:
        return


def _redraw(read: Callable[[], RunStatus], text: Callable[[RunStatus], str]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # names are the user's: no markup in them
    console = Console(markup=False, highlight=False, emoji=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            found = read()
            live.update(Text(text(found), no_wrap=True, overflow="ellipsis"), refresh=True)
            if found.state == "done":
                return
            time.sleep(REDRAW_SECONDS)


def _tell_changes(read: Callable[[], RunStatus], line: Callable[[RunStatus], str]) -> None:
    told = ""
    while True:
        found = read()
        if (now := line(found)) != told:
            say(f"{time.strftime('%H:%M:%S')} {now}")
            told = now
        if found.state == "done":
            return
        time.sleep(REDRAW_SECONDS)
