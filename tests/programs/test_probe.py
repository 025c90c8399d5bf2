"""What a probe tells of the machine that it runs on."""

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
    said: str = "",
) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert probe.main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_probe_tells_packages_processors_and_leaves_its_mark_in_the_folder(
    trial: ProbePaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (line,) = answers(monkeypatch, capsys, trial.root, "--node-local", trial.root)
    told = NodeRecord.model_validate_json(line)
    assert told.node == "n7"
    assert told.versions == dict(installed_versions())
    assert (told.broken, told.storage_problem, told.local_problem) == ({}, "", "")
    assert told.cpus >= 1
    assert told.local_bytes
    assert trial.node_file.exists()


def test_a_probe_waits_for_the_other_sides_file_each_time_it_is_told_to(
    trial: ProbePaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = answers(monkeypatch, capsys, trial.root, said="look\n")
    assert FileDelayRecord.model_validate_json(first).seconds is None
    trial.submitter_file.touch()
    _, second = answers(monkeypatch, capsys, trial.root, said="look\n")
    assert FileDelayRecord.model_validate_json(second).seconds is not None


def test_what_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    elsewhere = tmp_path / "elsewhere"
    words = ("--also", elsewhere / "model", "--also", tmp_path, "--node-local", "$NO_SUCH/x")
    (line,) = answers(monkeypatch, capsys, elsewhere / "trial" / "own", *words)
    told = NodeRecord.model_validate_json(line)
    assert told.absent == [str(elsewhere / "model")]
    assert told.storage_problem == f"{elsewhere} is not there"
    assert "$NO_SUCH/x" in told.local_problem


def test_a_folder_of_the_same_name_that_is_another_one_is_told(tmp_path: Path) -> None:
    told = probe.look(ProbePaths(root=tmp_path / "trial" / "own"), [], None, 0.0)
    assert told.storage_problem == f"{tmp_path} is another folder there"
