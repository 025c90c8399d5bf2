"""The live view of `fedllm run`: one display on a terminal, lines now and then in a log."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fedllm.cli.options import folded, relative_paths
from fedllm.storage.paths import RunPaths
from tests.reporting.runs import CLIENTS, aggregated, begin, claim, draw, prepare
from tests.storage.updates import publish

_SHOW = """
import sys, time
from pathlib import Path
from fedllm.cli.live_run import live_run
with live_run(Path(sys.argv[1])) as say:
    say("round 1/1: 4 clients in 4 bundles for 2 workers, and more words than fit in 60 columns")
    time.sleep(1.6)
"""


@pytest.fixture
def training(tmp_path: Path) -> RunPaths:
    """A run whose first round trains."""
    paths = begin(tmp_path / "run", rounds=1)
    prepare(paths)
    aggregated(0).publish(paths.round(0).aggregate_record)
    draw(paths, 1)
    claim(paths, 1, 1, 1)
    publish(paths.round(1), CLIENTS[0], bundle=0, run_id="run", round=1)
    return paths


_COUNT = """
import time
from fedllm.cli.progress_bar import progress_bar
with progress_bar() as count:
    for number in range(1, 13):
        time.sleep(0.1)
        count("rows tokenised", 10_000 * number, 400_000)
"""


def shown_on_terminal(columns: int, script: str, *arguments: object, **environment: str) -> str:
    """Return what a terminal of so many columns receives."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "COLUMNS", "LINES"}}
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm", **environment},
    ) as process:
        os.close(theirs)
        text = b""
        while chunk := _read(ours):
            text += chunk
    assert process.returncode == 0
    os.close(ours)
    return text.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nothing is left
        return b""


def test_a_narrow_terminal_without_colours_gets_whole_words(training: RunPaths) -> None:
    shown = shown_on_terminal(60, _SHOW, training.root, NO_COLOR="1")
    assert "1 of 4 clients, 1 at work" in shown
    assert "Ctrl-C" in shown
    assert "round 1" in shown
    assert "███░░░░░░░░" in shown
    assert "and more \r\nwords than fit" in shown
    assert "\x1b[36m" not in shown


def test_a_command_counts_with_a_rate_and_the_time_left() -> None:
    shown = shown_on_terminal(100, _COUNT, NO_COLOR="1")
    plain = re.sub("\x1b\\[[^A-Za-z]*[A-Za-z]", "", shown)
    assert re.search(r"rows tokenised █+░+ 120,000 of 400,000, [\d,]+ a second, \d+ s left", plain)


def test_a_log_gets_its_lines_as_they_are(training: RunPaths) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHOW, str(training.root)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        "round 1/1: 4 clients in 4 bundles for 2 workers, and more words than fit in 60 columns"
    ]


def test_text_folds_between_words_and_paths_stay_whole() -> None:
    text = "run a command with /a/path/that/is/longer/than/the/line now\n  a  table"
    assert folded(text, 20).splitlines() == [
        "run a command with",
        "/a/path/that/is/longer/than/the/line",
        "now",
        "  a  table",
    ]


def test_paths_are_relative_to_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    line = f"log {tmp_path}/runs/a/log, not /elsewhere/b"
    assert relative_paths(line) == "log runs/a/log, not /elsewhere/b"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert relative_paths(line) == line
