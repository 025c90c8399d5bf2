"""Workers that are warned, preempted, cancelled or out of time go on where they were."""

from pathlib import Path

import pytest

from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import SubmissionRecord, TaskRecord, UpdateRecord
from tests.cli.commands import fedllm, start
from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import (
    PATIENCE_SECONDS,
    Begun,
    arrays,
    claims,
    each_trained_once,
    published,
    python_of,
    state_of,
)
from tests.tiny import Tiny

pytestmark = pytest.mark.slurm

# Clients of a few seconds, of whom one is in training when something happens to its worker.
LONG = (
    "evaluation.every=0",
    "scheduler.kind=inline",
    "clients.cohort.count=2",
    "training.epochs=20",
    "training.max_steps=null",
)
ONE_WORKER = ("scheduler.max_parallel=1", "scheduler.clients_per_bundle=2")
SAVED_AT_ONCE = "training.checkpoint_every_minutes=0.002"


@pytest.fixture
def long(tiny: Tiny, tmp_path: Path) -> Begun:
    return Begun(tiny=tiny, folder=tmp_path, inline=LONG)


@pytest.fixture(scope="module")
def long_undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return states(Begun(tiny=tiny, folder=folder, inline=LONG).run("run", rounds=2))


def second_round(root: Path) -> RoundPaths:
    return RunPaths(root=root).round(2)


def worker_in_training(paths: RoundPaths) -> str:
    """Return the task of the one worker once it has saved a client in training."""
    until(lambda: list(paths.checkpoints.rglob("*.safetensors")), seconds=PATIENCE_SECONDS)
    return claims(paths.attempt(1))[0].task


def log_of(root: Path, task: str) -> str:
    (log,) = RunPaths(root=root).all_logs.rglob(f"{task}_0_log.out")
    return log.read_text()


def assert_went_on(root: Path, undisturbed: dict[str, str]) -> UpdateRecord:
    """Return the record of a client that was interrupted."""
    paths = second_round(root)
    assert each_trained_once(paths)
    assert states(root) == undisturbed
    assert not list(paths.checkpoints.rglob("*.safetensors"))
    return next(record for record in published(paths) if record.resumed_at)


def test_a_warned_worker_saves_requeues_itself_and_goes_on_at_that_step(
    long: Begun, cluster: Cluster, long_undisturbed: dict[str, str]
) -> None:
    root, log = long.run("run", rounds=1), long.folder / "log"
    process = start(*long.words(root, *ONE_WORKER, SAVED_AT_ONCE), log=log)
    paths = second_round(root)
    task = worker_in_training(paths)
    cluster.slurm("scancel", "--signal=USR2", task)
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    interrupted = assert_went_on(root, long_undisturbed)
    assert interrupted.resumed_at[0] > 0
    assert not paths.attempt(2).root.exists()
    record = TaskRecord.read(paths.attempt(1).task(task))
    assert (record.state, record.starts, record.clients_done) == ("ended", 2, 2)
    assert record.earlier_busy_seconds > 0
    assert f"{task}: stopped by SIGUSR2" in log_of(root, task)
    assert f"{task}: requeued" in log_of(root, task)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_whose_time_ends_requeues_itself_and_goes_on(
    long: Begun, long_undisturbed: dict[str, str]
) -> None:
    root, log = long.run("run", rounds=1), long.folder / "log"
    # Slurm warns up to 30 s early: 20 to 50 s after the start, when the client has begun
    limit = ("scheduler.sbatch.client.time=1", "scheduler.sbatch.client.signal=USR2@10")
    process = start(*long.words(root, *ONE_WORKER, SAVED_AT_ONCE, *limit), log=log)
    task = worker_in_training(second_round(root))
    # a client of a minute, without a minute of steps: Slurm continues what it warns
    python_of(task).suspend()
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    assert_went_on(root, long_undisturbed)
    assert f"{task}: stopped by SIGUSR2" in log_of(root, task)
    assert f"{task}: requeued" in log_of(root, task)


@pytest.mark.slow
def test_a_preempted_worker_goes_on_where_it_was(
    long: Begun, cluster: Cluster, long_undisturbed: dict[str, str]
) -> None:
    root, log = long.run("run", rounds=1), long.folder / "log"
    whole_node = "scheduler.sbatch.client.cpus-per-task=4"
    process = start(*long.words(root, *ONE_WORKER, SAVED_AT_ONCE, whole_node), log=log)
    task = worker_in_training(second_round(root))
    node = claims(second_round(root).attempt(1))[0].node
    cluster.slurm(
        "sbatch", "--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null",
        "--wrap=sleep 1",
    )  # fmt: skip
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    interrupted = assert_went_on(root, long_undisturbed)
    assert interrupted.task == task
    assert not second_round(root).attempt(2).root.exists()


def test_what_a_cancelled_worker_saved_is_gone_on_with_by_the_next_attempt(
    long: Begun, cluster: Cluster, long_undisturbed: dict[str, str]
) -> None:
    root, log = long.run("run", rounds=1), long.folder / "log"
    process = start(*long.words(root, *ONE_WORKER, SAVED_AT_ONCE), log=log)
    paths = second_round(root)
    task = worker_in_training(paths)
    cluster.slurm("scancel", task)
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    interrupted = assert_went_on(root, long_undisturbed)
    assert (interrupted.attempt, interrupted.resumed_at[0] > 0) == (2, True)
    assert state_of(cluster, task) == "CANCELLED"
    assert "requeued" not in log_of(root, task)


def test_a_worker_that_lingers_takes_two_rounds_with_one_start(
    begun: Begun, cluster: Cluster
) -> None:
    root = begun.run("run", rounds=1)
    words = begun.words(root, "rounds=3", "scheduler.linger_minutes=1", "scheduler.max_parallel=1")
    done = fedllm(*words)
    assert done.returncode == 0, done.stderr
    assert states(root) == states(begun.run("inline", rounds=3))
    first, second = (attempts(root, number) for number in (2, 3))
    (task,) = {claim.task for claim in claims(first)}
    assert {claim.task for claim in claims(second)} == {task}
    assert SubmissionRecord.read(second.submission).adopted == [task]
    assert not arrays(cluster, root, "r0003-a01")
    one, two = (TaskRecord.read(each.task(task)) for each in (first, second))
    assert (one.clients_done, two.clients_done, two.starts) == (4, 4, 1)
    assert two.startup_seconds < one.startup_seconds
    # it has nothing to stay for
    until(lambda: state_of(cluster, task) == "COMPLETED")


def attempts(root: Path, number: int) -> AttemptPaths:
    return RunPaths(root=root).round(number).attempt(1)
