"""What `fedllm verify` finds in a run whose files were damaged."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.reporting.status.verification import DamagedFile, verify_run
from fedllm.rounds.advance import advance
from fedllm.storage.paths import RunPaths
from tests.cli.commands import in_process
from tests.rounds.cluster import HandMoved, hand_moved
from tests.rounds.simulation import Simulation, complete, config_of, states


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two rounds."""
    root = tmp_path_factory.mktemp("whole") / "run"
    complete(root, Simulation(log=lambda _line: None), config_of(storage__keep_every=1))
    return root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunPaths:
    shutil.copytree(whole, tmp_path / "run")
    return RunPaths(root=tmp_path / "run")


def found(run: RunPaths) -> dict[str, DamagedFile]:
    return {str(f.path.relative_to(run.root)): f for f in verify_run(run).findings}


def test_a_whole_run_has_no_findings_and_every_file_of_it_is_checked(run: RunPaths) -> None:
    done = in_process("verify", run.root)
    assert done.returncode == 0
    for_people = ("metrics", "report", "answers", "progress")
    files = [p for p in run.root.rglob("*") if p.suffix in {".json", ".yaml", ".safetensors"}]
    checked = [p for p in files if not p.name.startswith(for_people)]
    assert done.stdout == f"{len(checked)} files checked, 0 not as they were written\n"


@pytest.mark.parametrize(
    ("name", "remedy", "code"),
    [
        ("run.json", "nothing: `fedllm resume` makes it again from run-copy.json", 3),
        ("prepared.json", "remove it: the run prepares again", 2),
        ("rounds/0001/cohort.json", "restore it from a backup", 2),
        ("rounds/0001/evaluation/evaluation.json", "remove it: the round is evaluated again", 2),
        ("rounds/0000/aggregate/global.safetensors", "nothing: later rounds do not need it", 3),
        ("rounds/0002/aggregate/global.safetensors", "nothing: it is aggregated again", 3),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(
    run: RunPaths, name: str, remedy: str, code: int
) -> None:
    (run.root / name).write_bytes(b"junk")
    done = in_process("verify", run.root)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"{name}: "))
    assert f"to do: {remedy}" in line
    assert done.returncode == code


def test_a_key_changed_by_hand_is_a_finding(run: RunPaths) -> None:
    run.config.write_text(run.config.read_text().replace("seed: 3", "seed: 4"))
    assert "seed (3 in the run, now 4)" in found(run)["config.yaml"].problem


def test_what_verify_says_that_resume_mends_it_mends(run: RunPaths) -> None:
    before = states(run.root)
    name = "rounds/0002/aggregate/global.safetensors"
    (run.root / name).write_bytes(b"junk")
    assert found(run)[name].resumes
    complete(run.root, Simulation(log=lambda _line: None), config_of(storage__keep_every=1))
    assert found(run) == {}
    assert states(run.root) == before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"{")])
def test_progress_records_never_stop_a_run(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    cluster = HandMoved(Simulation())
    run = hand_moved(tmp_path, cluster, scheduler__hung_minutes=1e-6)
    assert not advance(run)
    tasks = list(cluster.alive)
    cluster.start(*tasks)
    for task in tasks:
        cluster.note(task, "training", clients=["a"])
        damage(run.paths.round(1).attempt(1).task(task))
    assert not advance(run)
    cluster.end("FAILED", *[task for task in tasks if task in cluster.alive])
    assert not advance(run)
    cluster.work(*cluster.alive)
    assert advance(run)
