"""A task requeues itself, or says why that failed."""

from pathlib import Path

import pytest

from fedllm.scheduling.slurm.requeue import requeue


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
    ("script", "message"),
    [
        ("echo 'Requested operation is presently disabled' >&2; exit 1", "presently disabled"),
        ("exit 3", "exit code 3"),
    ],
)
def test_the_reason_why_slurm_did_not_requeue_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    a_scontrol(tmp_path, script, monkeypatch)
    assert message in str(requeue("12_3"))


def test_a_missing_scontrol_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue("12_3") == "no scontrol here"
    (tmp_path / "scontrol").write_text("no program")
    (tmp_path / "scontrol").chmod(0o755)
    assert "scontrol" in str(requeue("12_3"))
