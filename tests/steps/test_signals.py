"""Signals are noted from the first moment, and a task requeues itself only where it may."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm.steps.requeue import is_array_task, requeue
from fedllm.steps.signals import StopSignals
from fedllm.storage.paths import shipped

WARNINGS = [signal.SIGUSR1, signal.SIGUSR2]
ARRAY = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "FEDLLM_TASK": "12_3"}


@pytest.mark.parametrize("number", WARNINGS)
def test_a_warning_is_told_from_a_request_to_end(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert (signals.came, signals.only_warned, signals.name) == (False, False, "none")
        os.kill(os.getpid(), number)
        assert (signals.came, signals.only_warned) == (True, True)
        assert signals.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_who_was_told_to_end_after_a_warning_was_not_only_warned() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (signals.name, signals.only_warned) == ("SIGUSR2", False)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_while_python_still_imports_is_noted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", shipped("jobs/client.py"), str(tmp_path / "01")],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr
        # the first module after the one that takes the signals over
        while "fedllm.steps.signals" not in process.stderr.readline():
            pass
        while not handles(process.pid, signal.SIGUSR2):
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR2)
        said = process.stderr.read()
    # it came to what is wrong with its arguments, torch and all
    assert process.returncode == 2, said
    assert "import" in said
    assert "not a run directory" in said


def handles(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_only_a_task_of_an_array_of_ours_may_requeue_itself() -> None:
    assert is_array_task("12_3", ARRAY)
    # a local worker, and a worker by hand, inside somebody's own allocation
    assert not is_array_task("local-1", ARRAY | {"FEDLLM_TASK": "local-1"})
    assert not is_array_task("12_3", {k: v for k, v in ARRAY.items() if k != "FEDLLM_TASK"})
    assert not is_array_task("15", {"SLURM_JOB_ID": "15"})


def a_scontrol(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_task_is_requeued_by_array_and_index_with_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_scontrol(tmp_path, f'echo "$SLURM_CONF $@" > {tmp_path}/asked', monkeypatch)
    monkeypatch.setenv("SLURM_CONF", "/etc/my.conf")
    assert requeue("12_3") is None
    assert (tmp_path / "asked").read_text() == "/etc/my.conf requeue 12_3\n"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'Requested operation is presently disabled' >&2; exit 1", "presently disabled"),
        ("exit 3", "exit code 3"),
    ],
)
def test_why_slurm_did_not_requeue_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    a_scontrol(tmp_path, script, monkeypatch)
    assert told in str(requeue("12_3"))


def test_where_there_is_no_scontrol_this_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue("12_3") == "no scontrol here"
    (tmp_path / "scontrol").write_text("no program")
    (tmp_path / "scontrol").chmod(0o755)
    assert "scontrol" in str(requeue("12_3"))
