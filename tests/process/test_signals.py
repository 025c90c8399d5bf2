"""Signals are noted from the start of a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm.process.signals import StopSignals
from fedllm.storage.paths import shipped

WARNINGS = [signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", WARNINGS)
def test_a_warning_is_not_a_request_to_end(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert (signals.came, signals.only_warned, signals.name) == (False, False, "none")
        os.kill(os.getpid(), number)
        assert (signals.came, signals.only_warned) == (True, True)
        assert signals.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_request_to_end_counts_after_a_warning() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (signals.name, signals.only_warned) == ("SIGUSR2", False)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_ctrl_c_is_noted_and_the_second_ends_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert (signals.name, signals.only_warned) == ("SIGINT", False)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_while_python_still_imports_is_noted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", shipped("jobs/client.py"), str(tmp_path / "01")],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr
        # the first module that is imported after the handlers are installed
        while "fedllm.process.signals" not in process.stderr.readline():
            pass
        while not handles(process.pid, signal.SIGUSR2):
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR2)
        log = process.stderr.read()
    # it got as far as to refuse its arguments, after the import of torch
    assert process.returncode == 2, log
    assert "import" in log
    assert "not a run directory" in log


def handles(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)
