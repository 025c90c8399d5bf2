"""The findings of a probe on its machine."""

import io
import sys
from pathlib import Path

import pytest

from fedllm.doctor.trials import FileDelayRecord, NodeRecord, installed_versions
from fedllm.programs import probe
from fedllm.storage.paths import ProbePaths


@pytest.fixture
def trial(tmp_path: Path) -> ProbePaths:
    """A probe's own folder in a trial folder."""
    folder = tmp_path / "trial" / "own"
    folder.mkdir(parents=True)
    return ProbePaths(root=folder)


def answers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: object,
    lines: str = "",
) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert probe.main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_probe_reports_packages_and_processors_and_writes_its_file(
    trial: ProbePaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (line,) = answers(monkeypatch, capsys, trial.root, "--node-local", trial.root)
    record = NodeRecord.model_validate_json(line)
    assert record.node == "n7"
    assert record.versions == dict(installed_versions())
    assert (record.broken, record.storage_problem, record.local_problem) == ({}, "", "")
    assert record.cpus >= 1
    assert record.local_bytes
    assert trial.node_file.exists()


def test_a_probe_waits_for_the_other_sides_file_at_every_line(
    trial: ProbePaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = answers(monkeypatch, capsys, trial.root, lines="look\n")
    assert FileDelayRecord.model_validate_json(first).seconds is None
    trial.submitter_file.touch()
    _, second = answers(monkeypatch, capsys, trial.root, lines="look\n")
    assert FileDelayRecord.model_validate_json(second).seconds is not None


def test_missing_paths_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    elsewhere = tmp_path / "elsewhere"
    words = ("--also", elsewhere / "model", "--also", tmp_path, "--node-local", "$NO_SUCH/x")
    (line,) = answers(monkeypatch, capsys, elsewhere / "trial" / "own", *words)
    record = NodeRecord.model_validate_json(line)
    assert record.absent == [str(elsewhere / "model")]
    assert record.storage_problem == f"{elsewhere} is not there"
    assert "$NO_SUCH/x" in record.local_problem


def test_another_folder_of_the_same_name_is_named(tmp_path: Path) -> None:
    record = probe.look(ProbePaths(root=tmp_path / "trial" / "own"), [], None, 0.0)
    assert record.storage_problem == f"{tmp_path} is another folder there"
