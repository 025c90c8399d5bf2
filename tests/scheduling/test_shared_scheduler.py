"""Runs of a sweep share one scheduler and one throttle."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedllm.scheduling.seam import Capacity, Job, SchedulerFull, TaskState
from fedllm.scheduling.shared_scheduler import SchedulerPool, SharedScheduler
from tests.planning.federations import config_of


class Queue:
    """A scheduler that keeps every task until it is told that it ended."""

    def __init__(self) -> None:
        self.alive: set[str] = set()
        self.sent = 0
        self.closed = False

    def capacity(self, options: object, size: object) -> Capacity:  # noqa: ARG002
        return Capacity(free_slots=100, max_parallel=100, largest_array=1000)

    def room(self, options: object) -> None:  # noqa: ARG002
        return None

    def submit(self, job: Job) -> list[str]:
        ids = [f"{self.sent + n}" for n in range(job.tasks)]
        self.sent += job.tasks
        self.alive |= set(ids)
        return ids

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        return {i: TaskState.RUNNING if i in self.alive else TaskState.GONE for i in ids}

    def close(self) -> None:
        self.closed = True


def job(tasks: int) -> Job:
    return Job(name="n", program="client", argv=(), log_folder=Path("logs"), tasks=tasks)


def two_runs(limit: int | None) -> tuple[Queue, SchedulerPool, SharedScheduler, SharedScheduler]:
    queues: list[Queue] = []

    def make(_config: object) -> Queue:
        queues.append(Queue())
        return queues[-1]

    pool = SchedulerPool(make=make, max_parallel=limit)  # type: ignore[arg-type]
    one, two = pool.scheduler(config_of()), pool.scheduler(config_of(rounds=9))
    (queue,) = queues
    return queue, pool, one, two


def test_tasks_of_one_run_leave_less_room_for_the_other() -> None:
    queue, _, one, two = two_runs(10)
    one.submit(job(7))
    assert two.room({}) == 3
    assert (two.capacity({}).free_slots, two.capacity({}).max_parallel) == (3, 10)
    with pytest.raises(SchedulerFull, match="7 of max_parallel 10 tasks of the sweep are queued"):
        two.submit(job(4))
    two.submit(job(3))
    assert one.room({}) == 0
    queue.alive.clear()
    assert one.room({}) == 10


def test_an_array_larger_than_the_throttle_goes_out_alone() -> None:
    _, _, one, two = two_runs(2)
    assert len(one.submit(job(5))) == 5
    with pytest.raises(SchedulerFull):
        two.submit(job(1))


def test_tasks_of_an_earlier_coordinator_count_once_a_run_asks_about_them() -> None:
    queue, _, one, two = two_runs(4)
    queue.alive = {"x", "y"}
    one.states(["x", "y", "z"])
    assert two.room({}) == 2


def test_without_a_throttle_every_run_sees_the_whole_scheduler() -> None:
    _, _, one, two = two_runs(None)
    one.submit(job(500))
    assert two.room({}) is None
    assert two.capacity({}).free_slots == 100


def test_only_the_pool_ends_the_processes_that_all_share() -> None:
    queue, pool, one, _ = two_runs(None)
    one.close()
    assert not queue.closed
    pool.close()
    assert queue.closed
