"""Retention: what is pruned, what is kept, and that a pruned run still works."""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedllm.config.models import Config
from fedllm.reporting.status.status import run_status
from fedllm.rounds.retention import best_round, prune, removable
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord, EvaluationRecord, RoundRecord, TaskRecord
from tests.reporting.runs import evaluation
from tests.rounds.simulation import Simulation, complete, config_of, states

ROUNDS = 6
KEPT = {"storage__keep_states": 1, "storage__keep_every": 4, "storage__keep_logs": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six rounds that keeps everything it may keep, with logs and leftovers."""
    root = tmp_path_factory.mktemp("whole") / "run"
    keep = dict.fromkeys(KEPT, 1) | {"storage__keep_logs": 99, "storage__keep_states": 99}
    complete(root, Simulation(), config_of(rounds=ROUNDS, **keep))
    paths = RunPaths(root=root)
    for number in range(1, ROUNDS + 1):
        here = paths.round(number)
        write(here.attempt(1).task(f"{number}_0"))
        write(paths.logs(number) / f"{number}_0_0_log.out")
        write(paths.logs(number) / "0001" / f"{number}_300_0_log.out")
    return root


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunPaths:
    root = tmp_path / "run"
    shutil.copytree(whole, root)
    return RunPaths(root=root)


def write(path: Path, text: str = "12345678") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def policy(**changes: object) -> Config:
    return config_of(rounds=ROUNDS, evaluation__every=0, **{**KEPT, **changes})


def below(paths: RunPaths, found: Sequence[Path]) -> set[str]:
    return {str(path.relative_to(paths.root)) for path in found}


def numbers(paths: RunPaths, pattern: str) -> list[int]:
    return sorted(int(path.parts[-pattern.count("/")]) for path in paths.root.glob(pattern))


def test_states_of_the_last_of_every_nth_and_of_the_best_round_are_kept(
    run: RunPaths,
) -> None:
    scores = {n: evaluation(n, {"a": abs(n - 2.0)}) for n in range(ROUNDS + 1)}
    for number, record in scores.items():
        record.publish(run.round(number).evaluation_record)
    for number in range(2, ROUNDS + 1):
        write(run.round(number).earlier_state(1))
    prune(run, policy())
    assert list(states(run.root)) == ["0000", "0002", "0004", "0006"]
    assert numbers(run, "rounds/*/aggregate/earlier") == [2, 4, 6]
    hashes = [AggregateRecord.read(run.round(n).aggregate_record).sha256 for n in range(7)]
    assert len(set(hashes)) == ROUNDS + 1


def test_logs_claims_and_progress_of_the_last_rounds_are_kept(run: RunPaths) -> None:
    prune(run, policy())
    assert sorted(path.name for path in run.all_logs.iterdir() if path.is_dir()) == ["0005", "0006"]
    for number in range(1, ROUNDS + 1):
        attempt = run.round(number).attempt(1)
        assert bool(attempt.claim_files()) == (number > 4)
        assert bool(attempt.task_files()) == (number > 4)
        assert attempt.submission.exists()


def test_updates_and_checkpoints_are_removed_once_the_next_round_is_aggregated(
    run: RunPaths,
) -> None:
    for number in (5, 6):
        write(run.round(number).update(attempt=1, bundle=9, part=0))
        write(run.round(number).checkpoint("c"))
    prune(run, policy())
    assert not run.round(5).updates.exists()
    assert not run.round(5).checkpoints.exists()
    assert run.round(6).updates.exists()
    assert run.round(6).checkpoint("c").exists()


def test_the_log_of_a_worker_taken_over_by_a_kept_round_is_kept(run: RunPaths) -> None:
    write(run.round(6).attempt(1).task("3_0"))
    prune(run, policy())
    logs = [path for path in run.all_logs.rglob("*.out") if int(path.name[0]) < 5]
    assert below(run, logs) == {"logs/0003/3_0_0_log.out"}


def test_leftovers_and_files_set_aside_are_removed_only_in_rounds_that_are_done(
    run: RunPaths,
) -> None:
    run.round(6).record.unlink()
    names: tuple[str, ...] = (
        "collection.json.replaced-1",
        "updates/01-001-00.safetensors.damaged-2",
    )
    names += ("attempts/01.refused-1/submission.json", "evaluation/.evaluation.json.ab.part")
    for number in (5, 6):
        for name in names:
            write(run.round(number).root / name)
    write(run.rounds / "0000.replaced-1" / "cohort.json")
    write(run.rounds / "0006.replaced-1" / "cohort.json")
    prune(run, policy())
    left = {path for path in run.root.rglob("*") if "ed-" in path.name or ".part" in path.name}
    assert below(run, sorted(left)) == {
        "rounds/0006.replaced-1",
        *(f"rounds/0006/{name.removesuffix('/submission.json')}" for name in names),
    }


def test_a_dry_run_lists_removals_with_their_bytes_and_removes_nothing(run: RunPaths) -> None:
    before = {path: path.stat().st_size for path in run.root.rglob("*") if path.is_file()}
    found = removable(run, policy())
    assert {path: path.stat().st_size for path in before} == before
    assert prune(run, policy()) == found
    gone = sum(size for path, size in before.items() if not path.exists())
    assert sum(removal.num_bytes for removal in found) == gone > 0
    assert removable(run, policy()) == []


def test_a_round_that_waits_for_its_evaluation_is_left_alone(run: RunPaths) -> None:
    for number in (3, 4, 5, 6):
        run.round(number).record.unlink()
    found = below(run, [removal.path for removal in removable(run, policy())])
    assert not {path for path in found if int(path.split("/")[1]) > 2}
    # complete rounds 0 to 2: the last state, and logs of two
    assert "rounds/0001/aggregate/global.safetensors" in found
    assert "rounds/0002/aggregate/global.safetensors" not in found


def test_pruning_beside_a_coordinator_that_prunes_too_fails_in_neither(run: RunPaths) -> None:
    for bundle in range(300):
        write(run.round(4).attempt(1).claim(bundle), "{}")
    failed: list[BaseException] = []

    def remove() -> None:
        try:
            prune(run, policy())
        except BaseException as error:
            failed.append(error)

    together = [threading.Thread(target=remove) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert not failed
    assert removable(run, policy()) == []


def test_a_pruned_run_goes_on_to_the_same_bits(run: RunPaths, tmp_path: Path) -> None:
    more = config_of(rounds=ROUNDS + 2, **KEPT)
    complete(tmp_path / "straight", Simulation(), more)
    prune(run, policy())
    complete(run.root, Simulation(), more)
    assert states(run.root)["0008"] == states(tmp_path / "straight")["0008"]
    assert len(run.metrics.read_text().splitlines()) == ROUNDS + 3
    assert all(RoundRecord.find(run.round(n).record) for n in range(ROUNDS + 3))


def test_hours_used_are_known_after_the_records_of_tasks_are_gone(tmp_path: Path) -> None:
    simulation = Simulation()

    def note(program: str, target: Path) -> None:
        if program != "aggregate" or target.name == "0000":
            return
        attempt = RunPaths(root=tmp_path).round(int(target.name)).attempt(1)
        for task in ("7_0", "7_1"):
            TaskRecord(
                task=task,
                node="n",
                clients_done=2,
                worker_class="small",
                busy_seconds=900,
                allocated_seconds=1000,
                earlier_allocated_seconds=800,
            ).publish(attempt.task(task))
        write(attempt.task("7_2"), "damaged")

    simulation.before = note
    client = {"gpus": 2}
    config = config_of(rounds=3, storage__keep_logs=1, scheduler__sbatch__client=client)
    complete(tmp_path, simulation, config)
    paths = RunPaths(root=tmp_path)
    assert not paths.round(1).attempt(1).task_files()
    record = RoundRecord.read(paths.round(1).record)
    assert (record.tasks, record.busy_seconds) == (2, 1800)
    assert (record.allocated_seconds, record.gpu_seconds) == (3600, 7200)
    found = run_status(paths)
    assert (found.task_hours, found.gpu_hours, found.array_efficiency) == (3.0, 6.0, 0.5)


def test_the_best_round_is_chosen_among_evaluations_of_the_same_clients(tmp_path: Path) -> None:
    paths, config = RunPaths(root=tmp_path), config_of(rounds=4)
    assert best_round(paths, config) == set()
    # clients `d...` are dev clients: only they count where there are any
    for number, losses in {
        0: {"a": 0.1, "d": 0.2, "d2": 0.2},
        1: {"a": 0.1, "d": 3.0},
        2: {"a": 9.0, "d": 2.0},
        3: {"a": 0.1, "d": 4.0},
    }.items():
        evaluation(number, losses).publish(paths.round(number).evaluation_record)
    assert best_round(paths, config) == {2}
    EvaluationRecord(round=4, state_sha256="", complete=True, seconds=0.0, clients=[]).publish(
        paths.round(4).evaluation_record
    )
    assert best_round(paths, config) == {2}
