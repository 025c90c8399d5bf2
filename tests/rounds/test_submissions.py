"""Refused submissions: the user corrects the configuration, and the run goes on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ConfigError
from fedllm.rounds.coordinate import advance_while_possible, coordinate
from fedllm.rounds.opening import open_run
from fedllm.scheduling.inline import InlineScheduler
from fedllm.scheduling.seam import Job, SubmissionUnknown, TaskState
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, JobsRecord
from tests.rounds.cluster import HandMoved, hand_moved
from tests.rounds.simulation import Simulation, complete, config_of, states

TIERS = "scheduler__sbatch__tiers"


@dataclass(kw_only=True)
class Picky(InlineScheduler):
    """Scheduler that refuses jobs for partition `nope`, as sbatch does."""

    def submit(self, job: Job) -> list[str]:
        if job.options.get("partition") == "nope":
            raise ConfigError("partition: nope: refused")
        return super().submit(job)


def run(root: Path, **changes: object) -> Simulation:
    simulation = Simulation()
    opened = open_run(
        root,
        config_of(**changes),
        make_scheduler=lambda _paths, _config: Picky(execute=simulation),
        say=simulation.log,
    )
    coordinate(opened)
    return simulation


def test_a_wholly_refused_plan_is_made_again(tmp_path: Path) -> None:
    complete(tmp_path / "other", Simulation())
    root = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(ConfigError):
            run(root, scheduler__sbatch__client__partition="nope")
    run(root, scheduler__sbatch__client__partition="there")
    assert states(root) == states(tmp_path / "other")
    assert not RunPaths(root=root).round(1).attempt(2).root.exists()


@pytest.mark.parametrize(("refused", "taken"), [("small", {"large"}), ("large", set())])
def test_a_partly_refused_plan_keeps_the_arrays_submitted_before(
    tmp_path: Path, refused: str, taken: set[str]
) -> None:
    complete(tmp_path / "other", Simulation())
    root = tmp_path / "run"
    right = {f"{TIERS}__{tier}__partition": f"for {tier}" for tier in ("small", "large")}
    with pytest.raises(ConfigError):
        run(root, **right | {f"{TIERS}__{refused}__partition": "nope"})
    jobs = JobsRecord.find(RunPaths(root=root).round(1).attempt(1).jobs)
    assert {name.split("-")[-2] for name in (jobs.ids if jobs else ())} == taken
    again = run(root, **right)
    assert states(root) == states(tmp_path / "other")
    assert {tier(root, client) for number, client in again.trained if number == 1} == (
        {"small", "large"} - taken
    )


def tier(root: Path, client: str) -> str:
    cohort = CohortRecord.read(RunPaths(root=root).round(1).cohort)
    return next(member.tier for member in cohort.clients if member.id == client)


class Evasive(HandMoved):
    """Scheduler that gives no answer to submissions of one program or of one worker class."""

    def __init__(self, program: str, worker_class: str) -> None:
        super().__init__(Simulation())
        self.submitted: list[str] = []
        self.evades = True
        self._program, self._class = program, worker_class

    def submit(self, job: Job) -> list[str]:
        self.submitted.append(job.name)
        if self.evades and job.program == self._program and self._class in job.name:
            raise SubmissionUnknown("no job is named")
        return super().submit(job)


@pytest.mark.parametrize(
    ("program", "worker_class", "sent"),
    [("prepare", "", 1), ("client", "small", 4), ("client", "large", 3)],
)
def test_an_array_that_may_exist_is_submitted_again_only_once_a_person_allows_it(
    tmp_path: Path, program: str, worker_class: str, sent: int
) -> None:
    cluster = Evasive(program, worker_class)
    classes: dict[str, Any] = {
        f"{TIERS}__{tier}__partition": f"for {tier}" for tier in ("small", "large")
    }
    said = []
    for _ in range(3):
        with pytest.raises(SubmissionUnknown, match=r"^no job is named; .* remove /\S+$") as caught:
            advance_while_possible(hand_moved(tmp_path, cluster, **classes))
        said.append(str(caught.value))
    assert len(set(said)) == 1
    assert len(cluster.submitted) == sent
    assert cluster.finds >= 2
    cluster.evades = False
    with pytest.raises(SubmissionUnknown):
        advance_while_possible(hand_moved(tmp_path, cluster, **classes))
    assert len(cluster.submitted) == sent
    Path(said[0].split()[-1]).unlink()
    assert advance_while_possible(hand_moved(tmp_path, cluster, **classes)) is not None
    again = [name for name in cluster.submitted if cluster.submitted.count(name) > 1]
    assert again == [again[0]] * 2


def test_an_array_in_doubt_that_is_found_is_used(tmp_path: Path) -> None:
    cluster = Evasive("client", "small")
    with pytest.raises(SubmissionUnknown):
        advance_while_possible(hand_moved(tmp_path, cluster))
    cluster.evades = False
    name = cluster.submitted[-1]
    argv = (str(RunPaths(root=tmp_path.resolve()).round(1).attempt(1).root),)
    job = Job(name=name, program="client", argv=argv, log_folder=tmp_path)
    cluster.alive["77_0"] = (job, TaskState.WAITING)
    assert advance_while_possible(hand_moved(tmp_path, cluster)) is not None
    assert cluster.submitted.count(name) == 1
    jobs = JobsRecord.find(RunPaths(root=tmp_path.resolve()).round(1).attempt(1).jobs)
    assert jobs is not None
    assert jobs.ids[name] == ["77_0"]


def test_who_submitted_an_array_is_recorded_and_told_to_the_scheduler(tmp_path: Path) -> None:
    cluster = HandMoved(Simulation())
    run = hand_moved(tmp_path, cluster)
    assert advance_while_possible(run) is not None
    path = run.paths.round(1).attempt(1).jobs
    jobs = JobsRecord.read(path)
    assert jobs.users == dict.fromkeys(jobs.ids, os.geteuid())
    assert cluster.users == {}
    jobs.model_copy(update={"users": dict.fromkeys(jobs.ids, 1_000_007)}).publish(path)
    assert advance_while_possible(hand_moved(tmp_path, cluster)) is not None
    assert cluster.users == {id_: 1_000_007 for ids in jobs.ids.values() for id_ in ids}
