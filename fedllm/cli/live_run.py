"""Live view of a run in the process that coordinates it: one display, or lines now and then."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedllm.cli.options import relative_paths, say_of_run
from fedllm.errors import FedllmError
from fedllm.reporting.status.live_lines import fitted, live_lines, plain_line
from fedllm.reporting.status.status import RunStatus, StatusReader
from fedllm.storage.paths import RunPaths

_REDRAW_SECONDS = 1.0
# without a terminal: a line at first, then ever more seldom, so that logs of days stay short
_LINE_SECONDS = 15.0
_MAX_LINE_SECONDS = 600.0
_SHARE_OF_TIME = 0.05

Say = Callable[[str], None]


@contextmanager
def live_run(root: Path) -> Iterator[Say]:
    """Show a run while the block coordinates it; give a function that prints a line.

    A thread reads the run's files, so that it also shows jobs that this process runs itself.

    Args:
        root: the run directory, which may not exist yet.
    """
    # jobs in this process redirect `sys.stdout` to their logs
    out = sys.stdout
    show = _display if out.isatty() else _lines
    with show(root) as say_line:
        yield say_line


@contextmanager
def _repeated(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Repeat an action in a thread until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, name="live view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Reading:
    """Reading of a run's status; None as long as there is nothing to read."""

    def __init__(self, root: Path) -> None:
        self._paths = RunPaths(root=root.resolve())
        # the coordinator is this process
        self._reader = StatusReader(self._paths, gone=lambda _holder: False)

    def read(self) -> RunStatus | None:
        # the coordinator itself raises what is wrong with the run
        with suppress(FedllmError, OSError):
            return self._reader.read() if self._paths.run.exists() else None
        return None


@contextmanager
def _display(root: Path) -> Iterator[Say]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # names come from the user: read no markup in them
    console = Console(markup=False, highlight=False, emoji=False, file=sys.stdout)
    reading = _Reading(root)

    def drawn(status: RunStatus) -> Text:
        width = console.width - 1
        text = Text(no_wrap=True, overflow="crop")
        for line in live_lines(status):
            label, bar, words = fitted(line, width)
            text.append(label, "bold").append(bar, "cyan")
            text.append(f" {words}\n" if bar else f"{words}\n")
        return text.append("Ctrl-C stops in order; the same command goes on"[:width], "dim")

    def redraw() -> None:
        if status := reading.read():
            live.update(drawn(status), refresh=True)

    with (
        Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        ) as live,
        _repeated(redraw, _REDRAW_SECONDS),
    ):
        yield lambda line: console.print(Text(relative_paths(line)))


@contextmanager
def _lines(root: Path) -> Iterator[Say]:
    lines = _Lines(root)
    with _repeated(lines.print_now_and_then, _LINE_SECONDS):
        yield lambda line: say_of_run(relative_paths(line))


class _Lines:
    """Printer of a run's progress where there is no terminal."""

    def __init__(self, root: Path) -> None:
        self._reading = _Reading(root)
        self._out = sys.stdout
        self._last = ""
        self._began = self._printed = time.monotonic()

    def print_now_and_then(self) -> None:
        now = time.monotonic()
        pause = min(_MAX_LINE_SECONDS, _SHARE_OF_TIME * (now - self._began))
        status = self._reading.read() if now - self._printed >= pause else None
        line = plain_line(status) if status else ""
        if line and line != self._last:
            self._last, self._printed = line, now
            # nobody may read it any more, as behind `| head`
            with suppress(BrokenPipeError):
                self._out.write(f"{line}\n")
                self._out.flush()
