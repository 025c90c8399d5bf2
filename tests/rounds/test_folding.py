"""Folding ahead while a round trains: one small job at a time that the round never waits for."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.rounds.advance import advance
from fedllm.rounds.cancelling import cancel_jobs
from fedllm.rounds.opening import close_run
from fedllm.rounds.run import Run
from fedllm.rounds.work import work_of
from fedllm.scheduling.seam import Job, SchedulerFull, SchedulerUnreachable, TaskState
from fedllm.steps.aggregate import fold_ahead as steps_fold_ahead
from fedllm.storage.paths import attempts_of
from fedllm.storage.records import AggregateRecord, CohortRecord, CollectionRecord, ErrorRecord
from tests.rounds.cluster import HandMoved, hand_moved, paths_of
from tests.rounds.simulation import Simulation, complete, config_of, states

# six clients in three blocks, whose products come to less than their factors
FOLDS = {
    "aggregation__fold_ahead": True,
    "aggregation__block_clients": 2,
    "clients__cohort": {"count": 6},
    "clients__tiers": {"small": {"ranks": 9}, "large": {"ranks": 10}},
}


class Folding(HandMoved):
    """A cluster on which jobs that fold ahead wait until the test lets them work."""

    def __init__(self, simulation: Simulation, *, most_tasks: int | None = None) -> None:
        super().__init__(simulation, most_tasks=most_tasks)
        self.refusal: Exception | None = None

    def submit(self, job: Job) -> list[str]:
        if "--fold" not in job.argv:
            return super().submit(job)
        if self.refusal:
            raise self.refusal
        self.jobs.append(job)
        id_ = f"fold-{len(self.jobs)}"
        self.alive[id_] = (job, TaskState.WAITING)
        return [id_]

    @property
    def folding(self) -> list[str]:
        return [id_ for id_ in self.alive if id_.startswith("fold-")]

    @property
    def workers(self) -> list[str]:
        return [id_ for id_ in self.alive if not id_.startswith("fold-")]

    @property
    def asked(self) -> list[str]:
        """The blocks of every job that was to fold any."""
        return [job.argv[job.argv.index("--fold") + 1] for job in self.jobs if "--fold" in job.argv]


@pytest.fixture
def cluster() -> Folding:
    return Folding(Simulation())


def opened(
    root: Path,
    cluster: Folding,
    said: list[str] | None = None,
    *,
    unattended: bool = False,
    **changes: Any,
) -> Run:
    return hand_moved(root, cluster, said, unattended=unattended, **{**FOLDS, **changes})


def train_block(cluster: Folding, run: Run, block: int) -> None:
    """Have the clients of a block train, and nobody else."""
    cohort = CohortRecord.read(run.paths.round(1).cohort).clients
    cluster.simulation.only = {client.id for client in cohort[2 * block : 2 * block + 2]}
    for task in cluster.workers:
        job, _ = cluster.alive[task]
        cluster.simulation(job.program, job.argv, task, job.log_folder)
    cluster.simulation.only = None


def first_block_published(
    root: Path, cluster: Folding, said: list[str] | None = None, **changes: Any
) -> Run:
    """Open a run, train the first block of its cohort and look at what came of it."""
    run = opened(root, cluster, said, **changes)
    advance(run)
    train_block(cluster, run, 0)
    advance(run)
    return run


def finish(cluster: Folding, run: Run) -> AggregateRecord:
    cluster.work(*cluster.workers)
    for _ in range(10):
        if advance(run):
            break
        cluster.work(*cluster.workers)
    return AggregateRecord.read(run.paths.round(1).aggregate_record)


@pytest.fixture(scope="module")
def one_shot(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state's SHA-256 of a run that folds nothing ahead."""
    root = tmp_path_factory.mktemp("one") / "run"
    config = config_of(**{**FOLDS, "aggregation__fold_ahead": False, "rounds": 1})
    complete(root, Simulation(), config)
    return states(root)["0001"]


def test_blocks_are_folded_one_job_at_a_time_as_they_are_complete(
    tmp_path: Path, cluster: Folding, one_shot: str
) -> None:
    run = opened(tmp_path, cluster)
    assert not advance(run)
    assert cluster.asked == []
    train_block(cluster, run, 1)
    assert not advance(run)
    assert not advance(run)
    assert cluster.asked == ["1"]
    cluster.start(*cluster.folding)
    assert not advance(run)
    cluster.work(*cluster.folding)
    assert run.paths.round(1).fold(1).exists()
    assert not advance(run)
    assert cluster.asked == ["1"]  # nothing new
    record = finish(cluster, run)
    assert (record.folded_ahead, record.sha256) == ([1], one_shot)
    assert not run.paths.round(1).folds.exists()


def test_a_round_that_goes_on_does_not_wait_for_a_job_that_folds(
    tmp_path: Path, cluster: Folding, one_shot: str
) -> None:
    run = opened(tmp_path, cluster)
    assert not advance(run)
    train_block(cluster, run, 0)
    assert not advance(run)
    (waiting,) = cluster.folding
    record = finish(cluster, run)
    assert cluster.cancelled == [waiting]
    assert (record.folded_ahead, record.sha256) == ([], one_shot)


@pytest.mark.parametrize("kind", ["inline", "slurm"])
def test_a_running_job_is_ended_on_a_cluster_and_a_resident_process_left_alone(
    tmp_path: Path, cluster: Folding, kind: str
) -> None:
    changes: dict[str, Any] = {"scheduler__kind": kind, "storage__visibility_seconds": 0}
    run = opened(tmp_path, cluster, **changes)
    for _ in range(3):
        advance(run)
    train_block(cluster, run, 0)
    while not cluster.folding:
        advance(run)
    (running,) = cluster.folding
    cluster.start(running)
    finish(cluster, run)
    assert cluster.cancelled == ([running] if kind == "slurm" else [])


@pytest.mark.parametrize("how", ["its own error", "a kill"])
def test_a_job_that_fails_is_told_once_and_no_other_is_submitted(
    tmp_path: Path, cluster: Folding, one_shot: str, how: str
) -> None:
    said: list[str] = []
    run = first_block_published(tmp_path, cluster, said)
    if how == "a kill":
        cluster.end("NODE_FAIL", *cluster.folding)
        words = "NODE_FAIL on n1"
    else:
        error = ErrorRecord(kind="AdapterError", message="no good", exit_code=2)
        error.publish(run.paths.round(1).fold_job(1).error)
        cluster.alive.pop(cluster.folding[0])
        words = "(no good)"
    advance(run)
    train_block(cluster, run, 1)
    advance(run)
    told = [line for line in said if "ahead" in line]
    assert len(told) == 1
    assert words in told[0]
    # a coordinator that takes over neither tells it again nor asks again
    close_run(run)
    run = opened(tmp_path, cluster, said, unattended=True)
    advance(run)
    assert [line for line in said if "ahead" in line] == told
    record = finish(cluster, run)
    assert cluster.asked == ["0"]
    assert (record.folded_ahead, record.sha256) == ([], one_shot)


def test_a_job_that_was_preempted_is_not_told_and_its_blocks_are_asked_again(
    tmp_path: Path, cluster: Folding, one_shot: str
) -> None:
    said: list[str] = []
    run = first_block_published(tmp_path, cluster, said)
    cluster.end("PREEMPTED", *cluster.folding)
    train_block(cluster, run, 1)
    advance(run)
    assert cluster.asked == ["0", "0,1"]
    cluster.work(*cluster.folding)
    record = finish(cluster, run)
    assert (record.folded_ahead, record.sha256) == ([0, 1], one_shot)
    assert not [line for line in said if "ahead" in line]


def test_blocks_that_a_preempted_job_did_fold_are_not_asked_again(
    tmp_path: Path, cluster: Folding
) -> None:
    run = first_block_published(tmp_path, cluster)
    steps_fold_ahead(run.paths.round(1), [0])
    cluster.end("PREEMPTED", *cluster.folding)
    train_block(cluster, run, 1)
    advance(run)
    assert cluster.asked == ["0", "1"]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_job_that_the_coordinator_ended_did_not_fail_and_its_blocks_are_asked_again(
    tmp_path: Path, cluster: Folding, restarted: bool
) -> None:
    said: list[str] = []
    run = first_block_published(tmp_path, cluster, said)
    (first,) = cluster.folding

    def damage(program: str, target: Path) -> None:
        if program == "aggregate" and target.name == "0001":
            max((target / "updates").glob("*.safetensors")).write_bytes(b"")
            cluster.simulation.before = lambda _program, _target: None

    cluster.simulation.before = damage
    cluster.work(*cluster.workers)
    replaced = run.paths.round(1).collection.with_name("collection.json.replaced-1")
    while not replaced.exists():
        advance(run)
    assert cluster.cancelled == [first]
    if restarted:
        close_run(run)
        run = opened(tmp_path, cluster, said, unattended=True)
    advance(run)
    advance(run)
    assert cluster.asked[0] == "0"
    assert "0" in cluster.asked[1].split(",")
    assert not [line for line in said if "ahead" in line]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_job_left_by_a_coordinator_that_was_killed_after_collecting_is_ended(
    tmp_path: Path, cluster: Folding, one_shot: str, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    run = first_block_published(tmp_path, cluster)
    (folding,) = cluster.folding
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        replace(path, target)
        if target == run.paths.round(1).collection:
            raise KeyboardInterrupt
        return target

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        cluster.work(*cluster.workers)
        with pytest.raises(KeyboardInterrupt):
            advance(run)
    close_run(run)
    if not recorded:
        run.paths.round(1).fold_job(1).jobs.unlink()
    assert cluster.cancelled == []
    record = finish(cluster, opened(tmp_path, cluster))
    assert cluster.cancelled == [folding]
    assert record.sha256 == one_shot


def test_where_nothing_is_worth_it_one_job_finds_that_out(tmp_path: Path, cluster: Folding) -> None:
    said: list[str] = []
    ranks = {"small": {"ranks": 1}, "large": {"ranks": 1}}
    run = first_block_published(tmp_path, cluster, said, clients__tiers=ranks)
    cluster.work(*cluster.folding)
    train_block(cluster, run, 1)
    advance(run)
    assert (cluster.asked, cluster.folding) == (["0"], [])
    assert not [line for line in said if "ahead" in line]


def test_a_block_with_a_client_that_failed_is_not_folded(tmp_path: Path, cluster: Folding) -> None:
    run = opened(tmp_path, cluster, clients__quorum=2)
    advance(run)
    cohort = CohortRecord.read(run.paths.round(1).cohort).clients
    cluster.simulation.diverging = {cohort[0].id}
    train_block(cluster, run, 0)
    advance(run)
    assert cluster.asked == []


def test_workers_that_find_no_room_come_first(tmp_path: Path) -> None:
    cluster = Folding(Simulation(), most_tasks=2)
    run = opened(tmp_path, cluster)
    advance(run)
    assert len(cluster.workers) == 2
    train_block(cluster, run, 0)
    cluster.most_tasks = 3
    advance(run)
    assert (len(cluster.workers), cluster.asked) == (3, [])
    cluster.most_tasks = 7
    advance(run)
    advance(run)
    assert (len(cluster.workers), cluster.asked) == (6, ["0"])


def test_a_job_that_would_take_the_last_place_is_not_submitted(tmp_path: Path) -> None:
    cluster = Folding(Simulation(), most_tasks=6)
    run = opened(tmp_path, cluster)
    advance(run)
    assert len(cluster.workers) == 6
    train_block(cluster, run, 0)
    advance(run)
    assert cluster.asked == []
    cluster.most_tasks = 7
    advance(run)
    assert cluster.asked == ["0"]


@pytest.mark.parametrize("trouble", [SchedulerUnreachable("no answer"), SchedulerFull("full")])
def test_a_scheduler_that_takes_no_job_now_is_asked_again(
    tmp_path: Path, cluster: Folding, trouble: Exception
) -> None:
    run = opened(tmp_path, cluster)
    advance(run)
    train_block(cluster, run, 0)
    cluster.refusal = trouble
    assert not advance(run)
    assert cluster.asked == []
    cluster.refusal = None
    advance(run)
    assert cluster.asked == ["0"]


def test_a_job_that_is_refused_is_told_once_and_the_round_goes_on(
    tmp_path: Path, cluster: Folding, one_shot: str
) -> None:
    said: list[str] = []
    run = opened(tmp_path, cluster, said)
    advance(run)
    train_block(cluster, run, 0)
    cluster.refusal = ConfigError("scheduler.sbatch.aggregate: no such partition")
    for _ in range(3):
        assert not advance(run)
    told = [line for line in said if "cannot be folded ahead" in line]
    assert len(told) == 1
    assert "no such partition" in told[0]
    assert finish(cluster, run).sha256 == one_shot


def test_a_coordinator_that_starts_anew_goes_on_with_the_job_there_is(
    tmp_path: Path, cluster: Folding, one_shot: str
) -> None:
    run = opened(tmp_path, cluster)
    advance(run)
    train_block(cluster, run, 1)
    advance(run)
    run.lease.release()
    again = opened(tmp_path, cluster)
    advance(again)
    assert cluster.asked == ["1"]
    cluster.work(*cluster.folding)
    record = finish(cluster, again)
    assert (record.folded_ahead, record.sha256) == ([1], one_shot)


def test_a_chained_coordinator_looks_in_between_and_waits_for_workers_alone(
    tmp_path: Path, cluster: Folding
) -> None:
    run = opened(tmp_path, cluster)
    advance(run)
    train_block(cluster, run, 1)
    advance(run)
    (folding,) = cluster.folding
    work = work_of(run)
    assert work.look_again_minutes == 5
    assert set(work.tasks) == set(cluster.workers)
    assert folding not in work.tasks


def test_a_run_that_is_cancelled_ends_the_job_that_folds_too(
    tmp_path: Path, cluster: Folding
) -> None:
    run = opened(tmp_path, cluster)
    advance(run)
    train_block(cluster, run, 1)
    advance(run)
    (folding,) = cluster.folding
    cancel_jobs(run.paths, run.config, cluster)
    assert folding in cluster.cancelled


def test_an_update_damaged_after_it_was_folded_heals_with_its_block(
    tmp_path: Path, cluster: Folding, one_shot: str
) -> None:
    run = first_block_published(tmp_path, cluster)
    cluster.work(*cluster.folding)
    updates = run.paths.round(1).updates
    victim = min(updates.glob("*.safetensors"))

    def truncate(program: str, target: Path) -> None:
        if program == "aggregate" and target.name == "0001" and victim.exists():
            victim.write_bytes(victim.read_bytes()[:-1])
            cluster.simulation.before = lambda _program, _target: None

    cluster.simulation.before = truncate
    record = finish(cluster, run)
    assert CollectionRecord.read(run.paths.round(1).collection).replaces == 1
    assert record.sha256 == one_shot


def test_a_run_in_one_process_folds_between_two_attempts(tmp_path: Path, one_shot: str) -> None:
    simulation = Simulation()
    config = config_of(**{**FOLDS, "rounds": 1, "scheduler__clients_per_bundle": 1})

    def half_of_it(program: str, target: Path) -> None:
        if program != "client":
            return
        cohort = CohortRecord.read(target.parents[1] / "cohort.json").clients
        simulation.only = {c.id for c in cohort[2:4]} if target.name == "01" else None

    simulation.before = half_of_it
    complete(tmp_path / "run", simulation, config)
    record = AggregateRecord.read(paths_of(tmp_path / "run").round(1).aggregate_record)
    assert (record.folded_ahead, record.sha256) == ([1], one_shot)


def test_folds_go_with_the_round_that_used_them(tmp_path: Path, cluster: Folding) -> None:
    run = first_block_published(tmp_path, cluster, evaluation__every=1)
    cluster.work(*cluster.folding)
    assert attempts_of(run.paths.round(1).fold_job)
    finish(cluster, run)
    assert not run.paths.round(1).folds.exists()
    assert paths_of(tmp_path).round(1).updates.exists()
