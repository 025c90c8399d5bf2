"""Commands of the installed `fedllm`, run as a user runs them."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from fedllm.cli.main import run

FEDLLM = str(Path(sys.executable).with_name("fedllm"))

_started: "list[subprocess.Popen[bytes]]" = []


def fedllm(
    *arguments: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command line and wait for its end."""
    return subprocess.run(
        [FEDLLM, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def in_process(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a command line in this process, which starts no other Python."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with redirect_stdout(out), redirect_stderr(err):
        code = run(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def start(*arguments: object, log: Path) -> "subprocess.Popen[bytes]":
    """Start a command line in the background; its output goes to `log`."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [FEDLLM, *map(str, arguments)], stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    _started.append(process)
    return process


def end_started() -> None:
    """End the processes of `start` that a failed test left running."""
    while _started:
        process = _started.pop()
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a process has done something."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def one_line(done: "subprocess.CompletedProcess[str]", code: int = 2) -> str:
    """Return the line of an error, after checking that it is one line."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]
