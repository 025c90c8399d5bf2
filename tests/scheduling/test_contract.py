"""Laws of every scheduler; callers rely on nothing else."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from fedllm.scheduling.endings import exit_status, reason_of
from fedllm.scheduling.seam import EndReason, Job, Scheduler, SchedulerFull, TaskState
from tests.scheduling.conftest import on_sites
from tests.scheduling.sites import MAX_TASKS, Site

LONG_SECONDS = 60.0
EVERYWHERE = on_sites("inline", "local", "toy", "slurm")
CONCURRENT = on_sites("local", "toy", "slurm")
BATCH = on_sites("toy", "slurm")


def until(scheduler: Scheduler, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        scheduler.wait(0.05)


def until_gone(scheduler: Scheduler, ids: Sequence[str]) -> None:
    until(scheduler, lambda: set(scheduler.states(ids).values()) == {TaskState.GONE})


def until_running(scheduler: Scheduler, ids: Sequence[str]) -> None:
    until(scheduler, lambda: set(scheduler.states(ids).values()) == {TaskState.RUNNING})


@EVERYWHERE
def test_a_task_that_did_its_work_is_gone_and_has_no_ending(site: Site) -> None:
    scheduler = site.scheduler
    first, second = (scheduler.submit(site.job(name, tasks=2)) for name in ("one", "two"))
    assert len({*first, *second}) == 4
    until_gone(scheduler, [*first, *second])
    assert scheduler.endings([*first, *second]) == {}
    # states come in the order of the query
    assert [*scheduler.states([*second, *first])] == [*second, *first]


@EVERYWHERE
def test_a_task_that_failed_says_so_with_its_exit_code(site: Site) -> None:
    scheduler = site.scheduler
    ids = scheduler.submit(site.job("failing", tasks=2, code=3))
    well = scheduler.submit(site.job("well"))
    until_gone(scheduler, [*ids, *well])
    until(scheduler, lambda: len(scheduler.endings([*ids, *well])) == 2)
    endings = scheduler.endings([*ids, *well])
    assert {*endings} == {*ids}
    assert {reason_of(ending) for ending in endings.values()} == {EndReason.FAILED}
    assert {exit_status(ending) for ending in endings.values()} == {3}


@EVERYWHERE
def test_a_task_that_never_was_is_gone_and_passed_over(site: Site) -> None:
    scheduler = site.scheduler
    scheduler.cancel(["999999_0"])
    scheduler.cancel([])
    assert scheduler.states(["999999_0"]) == {"999999_0": TaskState.GONE}
    assert scheduler.endings(["999999_0"]) == {}
    assert scheduler.waiting_for(["999999_0"]) == {}
    assert scheduler.trouble() is None


@EVERYWHERE
def test_a_job_is_found_by_its_name_where_jobs_outlive_who_submitted_them(site: Site) -> None:
    scheduler = site.scheduler
    ids = scheduler.submit(site.job("found", tasks=2))
    scheduler.submit(site.job("found, too"))
    assert scheduler.find("nowhere") is None
    assert scheduler.find("found") == (ids if site.is_batch else None)
    until_gone(scheduler, ids)
    assert scheduler.find("found") == (ids if site.is_batch else None)


@EVERYWHERE
def test_capacity_room_and_limits_agree(site: Site) -> None:
    scheduler = site.scheduler
    # tasks of an earlier test may just be ending
    until(scheduler, lambda: scheduler.capacity({}).free_tasks == scheduler.room({}))
    found, limits = scheduler.capacity({}), scheduler.limits({})
    assert found.free_slots >= 1
    assert found.free_slots <= found.max_parallel or found.resident
    assert found.largest_array >= 1
    assert found.resident is not site.is_batch
    assert bool(limits.problem) is not site.is_batch
    assert limits.max_submitted == (MAX_TASKS if site.is_batch else None)
    scheduler.check([site.job("checked")])
    script = scheduler.script(site.job("checked"))
    assert (script is not None) is site.is_batch


@CONCURRENT
def test_waiting_and_running_tasks_have_their_own_states(site: Site) -> None:
    scheduler = site.scheduler
    ids = scheduler.submit(site.job("many", tasks=4, stays=True))
    until_running(scheduler, ids[:2])
    states = scheduler.states(ids)
    assert Counter(states.values()) == {TaskState.RUNNING: 2, TaskState.WAITING: 2}
    assert {*scheduler.waiting_for(ids)} == {*ids[2:]}


@CONCURRENT
def test_tasks_that_started_meanwhile_are_left_alone_on_request(site: Site) -> None:
    scheduler = site.scheduler
    ids = scheduler.submit(site.job("surplus", tasks=4, stays=True))
    until_running(scheduler, ids[:2])
    scheduler.cancel(ids, only_waiting=True)
    until_gone(scheduler, ids[2:])
    assert set(scheduler.states(ids[:2]).values()) == {TaskState.RUNNING}
    scheduler.cancel(ids)


@CONCURRENT
def test_cancelling_ends_what_is_named_and_nothing_else(site: Site) -> None:
    scheduler = site.scheduler
    ids = scheduler.submit(site.job("cancelled", tasks=4, stays=True))
    until_running(scheduler, ids[:2])
    scheduler.cancel([ids[0], ids[2], "999999_0"])
    until_gone(scheduler, [ids[0], ids[2]])
    scheduler.cancel([ids[0]])
    until_running(scheduler, [ids[1], ids[3]])
    if site.is_batch:
        # the end of a task that never started may be unknown
        until(scheduler, lambda: ids[0] in scheduler.endings(ids))
        endings = scheduler.endings(ids)
        assert {*endings} <= {ids[0], ids[2]}
        assert {reason_of(ending) for ending in endings.values()} == {EndReason.CANCELLED}


@EVERYWHERE
def test_waiting_returns_in_time(site: Site) -> None:
    scheduler = site.scheduler
    began = time.monotonic()
    scheduler.wait(0.05)
    if site.is_concurrent:
        scheduler.submit(site.job("staying", stays=True))
        scheduler.wait(0.05)
    assert time.monotonic() - began < LONG_SECONDS / 2


@EVERYWHERE
def test_closing_ends_what_belongs_to_this_process_alone(site: Site) -> None:
    scheduler = site.scheduler
    ids = scheduler.submit(site.job("left", stays=True))
    if site.is_concurrent:
        until_running(scheduler, ids)
    scheduler.close()
    state = TaskState.RUNNING if site.is_batch else TaskState.GONE
    assert scheduler.states(ids) == dict.fromkeys(ids, state)
    scheduler.close()


@BATCH
def test_a_full_queue_takes_nothing_and_has_room_again_later(site: Site) -> None:
    scheduler = site.scheduler
    ids = scheduler.submit(site.job("first", tasks=MAX_TASKS - 1, stays=True))
    with pytest.raises(SchedulerFull):
        scheduler.submit(site.job("too many", tasks=2))
    assert scheduler.find("too many") is None
    scheduler.cancel(ids)
    until_gone(scheduler, ids)
    again: list[str] = []

    def is_taken() -> bool:
        again.extend(_taken(scheduler, site.job("again")))
        return bool(again)

    until(scheduler, is_taken)
    until_gone(scheduler, again)


def _taken(scheduler: Scheduler, job: Job) -> list[str]:
    try:
        return scheduler.submit(job)
    except SchedulerFull:
        return []


@BATCH
def test_a_task_that_comes_back_keeps_its_id_and_is_never_gone(site: Site) -> None:
    scheduler = site.scheduler
    assert site.restart is not None
    ids = scheduler.submit(site.job("restarted", tasks=2, stays=True))
    until(scheduler, lambda: [site.starts(id_) for id_ in ids] == [1, 1])
    site.restart(ids[1])
    seen = set()

    def is_there_again() -> bool:
        seen.add(scheduler.states(ids)[ids[1]])
        return site.starts(ids[1]) == 2

    until(scheduler, is_there_again)
    assert TaskState.GONE not in seen
    assert site.starts(ids[0]) == 1
    until_running(scheduler, ids)
    assert scheduler.endings(ids) == {}
