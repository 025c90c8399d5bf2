"""A resident coordinator logs what it waits for; a chained one knows when to look again."""

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import Incomplete, Stopped, StorageFull
from fedllm.rounds.advance import advance
from fedllm.rounds.coordinate import advance_while_possible, coordinate, stopping_on_signals
from fedllm.rounds.dispatch.in_flight import InFlight, find_in_flight, is_done
from fedllm.rounds.opening import close_run
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import Job, SchedulerUnreachable, TaskState
from fedllm.storage.kept_records import FailureRecord
from fedllm.storage.lease import Lease
from fedllm.storage.records import PreparedRecord
from tests.rounds.cluster import HandMoved, hand_moved, paths_of
from tests.rounds.simulation import Simulation


class Silent(HandMoved):
    """Scheduler that does not answer for a while; its workers run after some waits."""

    def __init__(self, refused: int, troubles: Iterator[str | None]) -> None:
        super().__init__(Simulation())
        self.refused = refused
        self.troubles = troubles
        self.waited: list[float] = []

    def submit(self, job: Job) -> list[str]:
        if self.refused:
            self.refused -= 1
            raise SchedulerUnreachable("sbatch: no answer")
        return super().submit(job)

    def trouble(self) -> str | None:
        return next(self.troubles)

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        if len(self.waited) > 3:
            self.work(*self.alive)


@pytest.fixture
def cluster() -> HandMoved:
    return HandMoved(Simulation())


def test_a_chained_coordinator_returns_the_tasks_in_flight(
    tmp_path: Path, cluster: HandMoved
) -> None:
    assert advance_while_possible(hand_moved(tmp_path, cluster)) == InFlight(
        tasks=tuple(cluster.alive)
    )
    ended, *left = cluster.alive
    cluster.end("FAILED", ended)
    # the first coordinator released its lease
    assert advance_while_possible(hand_moved(tmp_path, cluster)) == InFlight(tasks=tuple(left))
    cluster.work(*cluster.alive)
    assert advance_while_possible(hand_moved(tmp_path, cluster)) is None
    Lease.acquire(paths_of(tmp_path))


class QueuedPreparation(HandMoved):
    """Cluster on which the job that prepares has to wait, too."""

    def submit(self, job: Job) -> list[str]:
        if job.program != "prepare":
            return super().submit(job)
        self.alive["prepare_0"] = (job, TaskState.WAITING)
        return ["prepare_0"]


def test_what_a_job_found_while_preparing_is_said_once_it_ends(tmp_path: Path) -> None:
    cluster, said = QueuedPreparation(Simulation()), list[str]()
    run = hand_moved(tmp_path, cluster, said)
    advance(run)
    cluster.work(*cluster.alive)
    found = PreparedRecord.read(run.paths.prepared)
    found.model_copy(update={"notes": ["one client trains"]}).publish(run.paths.prepared)
    advance(run)
    advance(run)
    assert said.count("prepare: one client trains") == 1
    close_run(run)
    advance(run := hand_moved(tmp_path, cluster, said))
    close_run(run)
    assert said.count("prepare: one client trains") == 1


def test_a_coordinator_in_a_batch_job_names_it_in_its_lease(
    tmp_path: Path, cluster: HandMoved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert hand_moved(tmp_path, cluster).lease.record.slurm_job == "12"


def test_a_file_that_may_still_appear_is_waited_for_before_it_returns(
    tmp_path: Path, cluster: HandMoved
) -> None:
    on_slurm: dict[str, Any] = {"scheduler__kind": "slurm", "storage__visibility_seconds": 0.05}
    advance_while_possible(hand_moved(tmp_path, cluster, **on_slurm))
    cluster.end("FAILED", *cluster.alive)
    # a later coordinator would start the wait again
    work = advance_while_possible(hand_moved(tmp_path, cluster, **on_slurm))
    assert work is not None
    assert set(work.tasks) == set(cluster.alive)
    assert paths_of(tmp_path).round(1).last_attempt() == 2


@pytest.mark.parametrize(
    ("changes", "minutes"),
    [
        ({}, None),
        ({"clients__deadline_minutes": 30}, 30),
        # the deadline is past: enough updates may come any time
        ({"clients__deadline_minutes": 1e-9, "clients__quorum": 1.0}, 5),
        ({"clients__over_sample": 0.5}, 5),
        # before the idle workers end
        ({"scheduler__linger_minutes": 8}, 4),
        ({"scheduler__linger_minutes": 0.5}, 1),
        ({"scheduler__linger_minutes": 60, "clients__deadline_minutes": 20}, 20),
    ],
)
def test_a_round_that_may_go_on_while_tasks_run_has_a_time_for_the_next_look(
    tmp_path: Path, cluster: HandMoved, changes: dict[str, Any], minutes: int | None
) -> None:
    work = advance_while_possible(hand_moved(tmp_path, cluster, **changes))
    assert work is not None
    assert work.tasks
    assert work.look_again_minutes == minutes


def test_idle_workers_are_not_in_flight(tmp_path: Path, cluster: HandMoved) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__linger_minutes=10)
    assert not advance(run)
    first, *others = cluster.alive
    cluster.start(first)
    cluster.note(first, "lingering")
    assert set(find_in_flight(run).tasks) == set(others)


def test_tasks_that_found_no_room_are_waited_for_too(tmp_path: Path) -> None:
    cluster = HandMoved(Simulation(), max_tasks=3)
    work = advance_while_possible(hand_moved(tmp_path, cluster))
    assert work == InFlight(tasks=tuple(cluster.alive), waits_for_room=True, look_again_minutes=5)
    full = HandMoved(Simulation(), max_tasks=0)
    none = advance_while_possible(hand_moved(tmp_path / "full", full))
    assert none == InFlight(tasks=(), waits_for_room=True)


def test_ctrl_c_raises_once_and_once_more_and_is_ignored_from_then_on() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping_on_signals():
        for _ in range(2):
            with pytest.raises(Stopped, match="stopped by Ctrl-C"):
                os.kill(os.getpid(), signal.SIGINT)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGINT) is before


def test_after_a_request_to_end_ctrl_c_is_ignored() -> None:
    with stopping_on_signals():
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


class Interrupted(HandMoved):
    """Scheduler whose user presses Ctrl-C while it waits for its tasks."""

    def wait(self, seconds: float) -> None:  # noqa: ARG002
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_coordinator_says_what_is_finished_and_how_to_go_on(tmp_path: Path) -> None:
    lines: list[str] = []
    run = hand_moved(tmp_path, Interrupted(Simulation()), lines)
    with pytest.raises(Stopped, match=rf"nothing is lost; go on with: fedllm resume {tmp_path}"):
        coordinate(run)
    assert lines[-1].startswith("stopped by Ctrl-C: workers publish the clients")
    # its lease is free
    Lease.acquire(paths_of(tmp_path))


class InterruptedTwice(Interrupted):
    """Scheduler whose user presses Ctrl-C again while workers end."""

    def close(self) -> None:
        self.wait(0.0)


def test_a_coordinator_stopped_twice_says_how_to_go_on_too(tmp_path: Path) -> None:
    run = hand_moved(tmp_path, InterruptedTwice(Simulation()))
    kept = "at once; what workers published is kept"
    with pytest.raises(Stopped, match=rf"{kept}; go on with: fedllm resume {tmp_path}"):
        coordinate(run)
    Lease.acquire(paths_of(tmp_path))


def test_a_silent_scheduler_is_called_again_with_growing_pauses(tmp_path: Path) -> None:
    cluster = Silent(refused=3, troubles=iter([None] * 99))
    heard: list[str] = []
    coordinate(hand_moved(tmp_path, cluster, heard, scheduler__poll_seconds=1))
    assert cluster.waited[:4] == [1, 2, 4, 1]
    assert heard.count("sbatch: no answer; asking again in 4 s") == 1


def test_a_silent_scheduler_is_logged_once_and_so_is_its_return(tmp_path: Path) -> None:
    cluster = Silent(refused=0, troubles=iter([None, "no answer", "no answer", None]))
    heard: list[str] = []
    coordinate(hand_moved(tmp_path, cluster, heard))
    lines = [line for line in heard if "answer" in line]
    assert lines == ["no answer; until then tasks count as running", "the scheduler answers again"]


class OnBadStorage(HandMoved):
    """Scheduler whose coordinator meets an error of the file system at some of its looks."""

    def __init__(self, errors: Iterator[Exception | None]) -> None:
        super().__init__(Simulation())
        self.errors = errors

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        error = next(self.errors, None)
        if error:
            raise error
        self.work(*self.alive)
        return super().states(ids)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES, errno.ETIMEDOUT])
def test_what_the_file_system_refuses_for_a_while_is_asked_again(code: int, tmp_path: Path) -> None:
    say: list[str] = []
    cluster = OnBadStorage(iter([None, OSError(code, os.strerror(code), "rounds/0001"), None]))
    run = hand_moved(tmp_path, cluster, say)
    coordinate(run)
    reason = os.strerror(code).lower()
    assert f"rounds/0001: {reason}; trying again in 0.5 s" in say
    assert is_done(run.paths, run.config)


@pytest.mark.parametrize("ends", [coordinate, advance_while_possible])
def test_a_file_system_that_keeps_refusing_ends_the_run_as_incomplete(
    ends: Callable[[Run], object], tmp_path: Path
) -> None:
    error = OSError(errno.EROFS, "Read-only file system", "rounds/0001")
    run = hand_moved(tmp_path, OnBadStorage(itertools.repeat(error)), storage__visibility_seconds=0)
    with pytest.raises(Incomplete, match="0001: read-only file system, for 0 s; repair the disk"):
        ends(run)
    failure = FailureRecord.read(run.paths.failure(run.lease.number))
    assert failure.exit_code == Incomplete.exit_code


def test_a_full_disk_is_not_waited_for(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageFull, match="no space left on device; make space"):
        coordinate(hand_moved(tmp_path, OnBadStorage(itertools.repeat(error))))
