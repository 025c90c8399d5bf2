"""Waves: arrays are submitted as limits on submitted jobs allow, and never twice."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.rounds.advance import advance
from fedllm.rounds.opening import close_run
from fedllm.scheduling.seam import Job, SchedulerFull
from fedllm.storage.records import JobsRecord, SubmissionRecord
from tests.rounds.cluster import HandMoved, hand_moved, paths_of
from tests.rounds.simulation import Simulation, complete, config_of, states

ONE_CLASS = {"clients__tiers": {"small": {"ranks": 2}, "large": {"ranks": 4}}}


def test_arrays_are_split_at_the_largest_size(tmp_path: Path) -> None:
    cluster = HandMoved(Simulation(), largest_array=3)
    run = hand_moved(tmp_path / "run", cluster)
    while not advance(run):
        assert all(job.tasks <= 3 for job in cluster.arrays)
        if len(cluster.alive) == 4:
            cluster.work(*cluster.alive)
    assert [job.tasks for job in cluster.arrays] == [3, 1]
    assert [job.name.rpartition("-")[2] for job in cluster.arrays] == ["0", "1"]
    plan = SubmissionRecord.read(paths_of(tmp_path / "run").round(1).attempt(1).submission)
    assert plan.workers["small"].tasks == 4


def test_waves_follow_the_room_in_the_queue_and_single_jobs_wait_for_it(tmp_path: Path) -> None:
    say: list[str] = []
    cluster = HandMoved(Simulation(), max_tasks=2)
    run = hand_moved(tmp_path / "run", cluster, say, clients__cohort__count=8)
    most = 0
    while not advance(run):
        most = max(most, len(cluster.alive))
        # each task trains all that is left, so the others are not needed: end them one by one
        cluster.end("COMPLETED", next(iter(cluster.alive)))
        if len(cluster.arrays) > 3:
            cluster.work(next(iter(cluster.alive)))
    assert most == 2
    assert len(cluster.arrays) >= 4
    assert "2 submitted now, the others as limits allow" in " ".join(say)


def test_no_wave_follows_when_every_bundle_is_taken(tmp_path: Path) -> None:
    cluster = HandMoved(Simulation(), max_tasks=2)
    run = hand_moved(tmp_path / "run", cluster, clients__cohort__count=8)
    assert not advance(run)
    first, second = cluster.alive
    cluster.work(first)
    cluster.start(second)
    assert advance(run)
    assert [job.tasks for job in cluster.arrays] == [2]


def test_a_full_queue_is_not_queried_again_and_again(tmp_path: Path) -> None:
    say: list[str] = []
    cluster = HandMoved(Simulation(), max_tasks=0)
    run = hand_moved(tmp_path / "run", cluster, say, scheduler__query_seconds=1000)
    for _ in range(5):
        assert not advance(run)
    assert (cluster.jobs, cluster.finds) == ([], 0)
    assert sum("waits for room" in line for line in say) == 1


def test_arrays_that_found_no_room_are_not_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = HandMoved(Simulation(), largest_array=1)
    submit, submitted = cluster.submit, list[str]()

    def full(job: Job) -> list[str]:
        if job.program != "client":
            return submit(job)
        submitted.append(job.name)
        raise SchedulerFull("too many jobs in the cluster")

    monkeypatch.setattr(cluster, "submit", full)
    run = hand_moved(tmp_path / "run", cluster, scheduler__query_seconds=1000)
    for _ in range(5):
        assert not advance(run)
    # the first of four, when it was planned and once more
    assert (len(set(submitted)), len(submitted), cluster.finds) == (1, 2, 0)


def test_clients_of_a_refused_wave_train_once_the_configuration_is_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"clients__cohort__count": 8, "rounds": 1}
    cluster = HandMoved(Simulation(), max_tasks=3)
    run = hand_moved(tmp_path / "run", cluster, **changes)
    assert not advance(run)
    cluster.end("COMPLETED", *list(cluster.alive)[:2])

    def refuse(job: Job) -> list[str]:
        raise ConfigError(f"partition: closed: {job.name}")

    with monkeypatch.context() as closed:
        closed.setattr(cluster, "submit", refuse)
        with pytest.raises(ConfigError, match="closed"):
            advance(run)
    close_run(run)
    cluster.end("COMPLETED", *cluster.alive)
    mended: dict[str, Any] = {"scheduler__sbatch": {"client": {"partition": "open"}}}
    run = hand_moved(tmp_path / "run", cluster, **changes, **mended)
    assert not advance(run)
    assert cluster.arrays[-1].options["partition"] == "open"
    cluster.work(*cluster.alive)
    assert advance(run)


def test_another_coordinator_goes_on_with_the_waves(tmp_path: Path) -> None:
    other = tmp_path / "other"
    cluster = HandMoved(Simulation(), max_tasks=3)
    run = hand_moved(tmp_path / "run", cluster, clients__cohort__count=8)
    assert not advance(run)
    close_run(run)
    attempt = paths_of(tmp_path / "run").round(1).attempt(1)
    assert [len(ids) for ids in JobsRecord.read(attempt.jobs).ids.values()] == [3]
    # the ids were not recorded: the array is found by its name
    attempt.jobs.unlink()
    run = hand_moved(tmp_path / "run", cluster, clients__cohort__count=8)
    assert not advance(run)
    assert [job.tasks for job in cluster.arrays] == [3]
    cluster.end("COMPLETED", *list(cluster.alive)[:2])
    assert not advance(run)
    assert [job.tasks for job in cluster.arrays] == [3, 2]
    cluster.work(*cluster.alive)
    assert advance(run)
    changes: dict[str, Any] = {"clients__cohort__count": 8, "rounds": 1, "evaluation__every": 0}
    complete(other, Simulation(), config_of(**changes))
    assert states(tmp_path / "run") == states(other)
