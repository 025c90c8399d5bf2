"""The command `doctor` without a cluster."""

import grp
import json
from pathlib import Path

import pytest

from fedllm.storage.hub import hub_key
from fedllm.storage.paths import CachePaths, RunPaths
from fedllm.storage.records import PreparedRecord
from tests.cli.commands import in_process
from tests.slurm.runs import settings
from tests.tiny import Tiny


def found(*words: object) -> tuple[int, dict[str, dict[str, str]]]:
    """Return the exit code of `doctor` and its findings, by check."""
    done = in_process("doctor", *words, "--json")
    assert not done.stderr, done.stderr
    return done.returncode, {each["check"]: each for each in json.loads(done.stdout)}


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Slurm's commands."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


@pytest.mark.parametrize("kind", ["local", "inline"])
def test_without_a_cluster_storage_and_paths_are_looked_at_and_the_rest_says_why_not(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    words = ("--run-dir", tmp_path / "run", *settings(f"scheduler.kind={kind}"))
    code, checks = found(tiny.config, *words)
    assert code == 0
    assert checks["configuration"]["level"] == "ok"
    assert checks["model.path"]["found"] == f"{tiny.model} is here"
    assert checks["slurm"]["level"] == "not done"
    assert kind in checks["slurm"]["found"]
    assert "hard links and fsync hold" in checks["storage of runs"]["found"]
    assert "storage of cache" in checks
    assert checks["group"]["level"] == "not done"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_slurm")
def test_every_problem_of_a_configuration_is_a_failure_and_the_rest_is_looked_at(
    tiny: Tiny, tmp_path: Path
) -> None:
    words = ("--run-dir", tmp_path / "run", *settings("rounds=0", "training.epochs=0"))
    done = in_process("doctor", tiny.config, *words)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert any(line.startswith("fail      configuration: rounds: ") for line in lines)
    assert any(line.startswith("fail      configuration: training.epochs: ") for line in lines)
    assert any("storage of runs" in line for line in lines)


@pytest.mark.usefixtures("no_slurm")
def test_a_cluster_that_is_not_there_is_one_failure_and_what_it_keeps_from_being_done(
    tmp_path: Path,
) -> None:
    code, checks = found("--run-dir", tmp_path / "run")
    assert code == 2
    assert checks["slurm"]["level"] == "fail"
    assert "not found" in checks["slurm"]["found"]
    assert checks["compute nodes"]["level"] == "not done"
    assert [each["check"] for each in checks.values() if each["level"] == "fail"] == ["slurm"]


def test_paths_and_names_that_are_not_here_are_told_with_their_keys(
    tiny: Tiny, tmp_path: Path
) -> None:
    changes = ("model.path=owner/name", f"data.path={tmp_path / 'no'}")
    words = ("--run-dir", tmp_path / "run", *settings("scheduler.kind=inline", *changes))
    code, checks = found(tiny.config, *words)
    assert code == 2
    assert checks["model.path"]["level"] == "warn"
    assert "fedllm prepare" in checks["model.path"]["change"]
    assert checks["data.path"]["level"] == "fail"
    code, checks = found(tiny.config, *words, *settings("storage.group=no-such"))
    assert code == 2
    assert checks["configuration"]["found"].startswith("storage.group: no group no-such")


def test_of_a_prepared_run_the_room_for_a_round_is_known(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    changes = ("scheduler.kind=inline", "rounds=1", "evaluation.every=0")
    words = ("--run-dir", root, *settings(*changes))
    assert in_process("run", tiny.config, *words).returncode == 0
    code, checks = found(tiny.config, *words)
    assert code == 0
    assert checks["prepared"]["level"] == "ok"
    assert "a round publishes updates of" in checks["free space"]["found"]


@pytest.mark.parametrize(("mode", "level"), [(0o2770, "ok"), (0o750, "ok"), (0o700, "warn")])
def test_a_group_needs_a_way_to_the_runs(tiny: Tiny, tmp_path: Path, mode: int, level: str) -> None:
    group = grp.getgrgid(tmp_path.stat().st_gid).gr_name
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    changes = ("scheduler.kind=inline", f"storage.group={group}")
    _, checks = found(tiny.config, "--run-dir", shared / "run", *settings(*changes))
    assert checks["group"]["level"] == level
    assert (str(shared) in checks["group"]["change"]) is (level == "warn")


def test_a_fetched_model_needs_no_network(tiny: Tiny, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    CachePaths(root=cache).model(hub_key("owner/name", None)).mkdir(parents=True)
    changes = ("scheduler.kind=inline", "model.path=owner/name", f"storage.cache={cache}")
    _, checks = found(tiny.config, "--run-dir", tmp_path / "run", *settings(*changes))
    assert checks["model.path"]["level"] == "ok"
    assert "was fetched to" in checks["model.path"]["found"]


def test_a_prepared_run_whose_base_is_gone_is_told(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    words = ("--run-dir", root, *settings("scheduler.kind=inline", "evaluation.every=0"))
    assert in_process("run", tiny.config, *words, *settings("rounds=1")).returncode == 0
    prepared = PreparedRecord.read(RunPaths(root=root).prepared)
    gone = prepared.model_copy(update={"model_path": str(tmp_path / "gone")})
    gone.publish(RunPaths(root=root).prepared)
    code, checks = found(tiny.config, *words)
    assert code == 2
    assert checks["prepared"]["level"] == "fail"
