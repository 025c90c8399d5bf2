"""Workers: their number follows work and free slots, their time limit the work."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.models import SchedulerSection
from fedllm.errors import ConfigError
from fedllm.planning.capacity import Capacity
from fedllm.planning.costs import SECONDS_PER_CLIENT, CostModel
from fedllm.planning.engines import group_clients
from fedllm.planning.workers import ClassPlan, next_arrays, plan_classes
from fedllm.storage.records import CohortClient

CLASSES = {"t1": "t1", "t2": "t1", "t3": "t3"}
RANKS = {"t1": {"m": 8}, "t2": {"m": 8}, "t3": {"m": 12}}
COSTS = CostModel(seconds_per_token=dict.fromkeys(CLASSES, 1.0), calibrated=True)


def clients_of(tier: str, count: int, minutes: float) -> list[CohortClient]:
    cost = 60.0 * minutes - SECONDS_PER_CLIENT
    return [CohortClient(id=f"{tier}-{n:05}", tier=tier, cost=cost) for n in range(count)]


def planned(
    clients: list[CohortClient],
    *,
    free: int = 1000,
    parallel: int = 64,
    costs: CostModel = COSTS,
    resident: bool = False,
    max_minutes: float | None = None,
    options: dict[str, str | int | float | bool | None] | None = None,
    together: int = 1,
    **section: object,
) -> dict[str, ClassPlan]:
    capacity = Capacity(
        free_slots=free,
        max_parallel=parallel,
        largest_array=400,
        max_minutes=max_minutes,
        resident=resident,
    )
    plans = plan_classes(
        group_clients(clients, RANKS, together),
        CLASSES,
        costs=costs,
        capacities=dict.fromkeys(CLASSES.values(), capacity),
        options=dict.fromkeys(CLASSES.values(), options or {}),
        section=SchedulerSection.model_validate(section),
        startup_seconds=60.0,
    )
    return {plan.worker_class: plan for plan in plans}


def test_scarce_slots_get_tasks_of_the_target_duration() -> None:
    plan = planned(clients_of("t1", 600, 1.0), free=0)["t1"]
    assert (plan.workers, plan.parallel) == (20, 20)
    assert planned(clients_of("t1", 600, 1.0), free=0, target_minutes=60)["t1"].workers == 10


def test_free_slots_are_used_while_each_worker_has_its_minimum_of_work() -> None:
    work = clients_of("t1", 600, 1.0)
    assert planned(work, free=40)["t1"].workers == 40
    # 600 minutes are enough work for 120 workers of 5 minutes, of which 64 may run
    assert planned(work, free=500)["t1"].workers == 64
    assert planned(work, free=500, parallel=500)["t1"].workers == 120
    assert planned(work, free=500, parallel=500, worker_minutes_min=10)["t1"].workers == 60
    assert planned(clients_of("t1", 3, 1.0))["t1"].workers == 1


@given(
    count=st.integers(1, 300),
    minutes=st.floats(0.01, 50),
    free=st.integers(0, 300),
    parallel=st.integers(1, 300),
)
def test_there_are_as_many_workers_as_free_slots_while_each_has_enough_work(
    count: int, minutes: float, free: int, parallel: int
) -> None:
    plan = planned(clients_of("t1", count, minutes), free=free, parallel=parallel)["t1"]
    worth_it = int(count * minutes / 5.0 + 1e-6)
    assert plan.workers >= min(free, parallel, worth_it, len(plan.bundles))
    assert 1 <= plan.parallel <= min(plan.workers, parallel)
    assert plan.workers <= len(plan.bundles)


def test_more_work_than_may_run_at_once_waits_behind_the_throttle() -> None:
    plan = planned(clients_of("t1", 6000, 1.0), parallel=64)["t1"]
    assert (plan.workers, plan.parallel) == (200, 64)
    # the first bundle is still only a part of a task's target duration
    assert max(bundle.cost for bundle in plan.bundles) <= 60 * 10
    few = planned(clients_of("t1", 6000, 1.0), parallel=2)["t1"]
    assert (few.workers, few.minutes) == (200, 47)


def test_slots_are_shared_among_classes_by_work_and_none_goes_without() -> None:
    work = [*clients_of("t1", 300, 1.0), *clients_of("t2", 300, 1.0), *clients_of("t3", 200, 1.0)]
    plans = planned(work, parallel=16)
    assert {name: plan.parallel for name, plan in plans.items()} == {"t1": 12, "t3": 4}
    numbers = [bundle.number for name in ("t1", "t3") for bundle in plans[name].bundles]
    assert numbers == list(range(len(numbers)))
    one = planned([*clients_of("t1", 90, 9.0), *clients_of("t3", 1, 0.1)], parallel=1)
    assert {name: plan.workers for name, plan in one.items()}["t3"] == 1


def test_a_class_that_cannot_use_its_slots_leaves_them_to_the_others() -> None:
    plans = planned([*clients_of("t1", 40, 6.0), *clients_of("t3", 1, 6000.0)], parallel=16)
    assert {name: plan.parallel for name, plan in plans.items()} == {"t1": 15, "t3": 1}


def test_resident_workers_share_any_work_and_have_no_time_limit() -> None:
    plan = planned(clients_of("t1", 16, 0.001), parallel=2, free=2, resident=True)["t1"]
    assert (plan.workers, plan.minutes, plan.options) == (2, None, {})
    assert len(plan.bundles) >= 8


def test_clients_per_task_makes_a_task_of_every_bundle() -> None:
    plan = planned(clients_of("t1", 10, 0.1), clients_per_task=1)["t1"]
    assert (plan.workers, [len(b.clients) for b in plan.bundles]) == (10, [1] * 10)
    assert planned(clients_of("t1", 10, 0.1), clients_per_task=4)["t1"].workers == 3


def test_the_time_limit_is_the_estimate_with_a_margin_that_shrinks_once_measured() -> None:
    work = clients_of("t1", 600, 1.0)
    plan = planned(work, free=0)["t1"]
    assert plan.minutes == math.ceil(1.5 * (30 + 1))
    assert plan.options == {"time": 47}
    unmeasured = CostModel(seconds_per_token=COSTS.seconds_per_token)
    assert planned(work, free=0, costs=unmeasured)["t1"].minutes == 93
    assert planned(clients_of("t1", 1, 0.1))["t1"].minutes == 5
    assert planned(clients_of("t1", 1, 0.1), costs=unmeasured)["t1"].minutes == 15


def test_the_longest_client_has_its_time_and_the_partition_its_limit() -> None:
    work = [*clients_of("t1", 60, 1.0), CohortClient(id="long", tier="t1", cost=6000.0)]
    assert planned(work, free=64)["t1"].minutes == math.ceil(1.5 * 101)
    assert planned(work, free=64, max_minutes=45.0)["t1"].minutes == 45.0


def test_a_configured_time_limit_is_taken_as_it_is() -> None:
    plan = planned(clients_of("t1", 600, 1.0), options={"time": "1:30:00"})["t1"]
    assert (plan.minutes, plan.options) == (90.0, {"time": "1:30:00"})
    # null leaves the time limit to the site
    assert planned(clients_of("t1", 9, 1.0), options={"time": None})["t1"].options == {"time": None}
    with pytest.raises(ConfigError, match="time of class t1: got 'soon', need minutes"):
        planned(clients_of("t1", 9, 1.0), options={"time": "soon"})


def test_the_time_limit_of_workers_that_stay_idle_includes_that_time() -> None:
    plan = planned(clients_of("t1", 1, 0.1), linger_minutes=20, target_minutes=30)["t1"]
    assert plan.minutes == 50


def test_groups_train_where_the_member_of_largest_rank_does() -> None:
    work = [*clients_of("t1", 5, 1.0), *clients_of("t3", 4, 1.0)]
    alone = planned(work, clients_per_bundle=1)
    together = planned(work, clients_per_bundle=1, together=4)
    assert [len(plan.bundles) for plan in alone.values()] == [5, 4]
    # the fifth of t1 goes with three of t3
    sizes = {name: [len(b.clients) for b in plan.bundles] for name, plan in together.items()}
    assert sizes == {"t1": [4], "t3": [4, 1]}
    assert sum(plan.seconds for plan in together.values()) == pytest.approx(9 * 60.0)
    assert together["t1"].workers == 1


def test_arrays_are_split_at_their_largest_size_and_at_the_room_in_the_queue() -> None:
    wanted = {"a": 25, "b": 3}

    def sizes(a: int | None, b: int | None) -> dict[str, list[int]]:
        return next_arrays(wanted, largest={"a": 10, "b": 10}, rooms={"a": a, "b": b})

    everything = {"a": [10, 10, 5], "b": [3]}
    assert sizes(None, None) == sizes(28, 28) == sizes(None, 3) == everything
    assert sizes(5, 5) == {"a": [4], "b": [1]}
    assert sizes(0, 0) == {}
    # a class of a full QOS does not delay others, and classes with more room share it
    assert sizes(0, None) == sizes(0, 9) == {"b": [3]}
    assert sizes(20, 2) == {"a": [10, 8], "b": [2]}
    assert next_arrays({"a": 0}, largest={"a": 1}, rooms={"a": None}) == {}


@given(
    wanted=st.dictionaries(st.sampled_from("abc"), st.integers(0, 50)),
    largest=st.integers(1, 20),
    free=st.none() | st.integers(0, 60),
)
def test_waves_submit_every_task_in_the_end(
    wanted: dict[str, int], largest: int, free: int | None
) -> None:
    left = dict(wanted)
    for _ in range(200):
        wave = next_arrays(
            left, largest=dict.fromkeys(left, largest), rooms=dict.fromkeys(left, free)
        )
        sent = {name: sum(sizes) for name, sizes in wave.items()}
        assert sum(sent.values()) <= (math.inf if free is None else free)
        assert all(0 < size <= largest for sizes in wave.values() for size in sizes)
        assert all(count <= left[name] for name, count in sent.items())
        left = {name: count - sent.get(name, 0) for name, count in left.items()}
    assert not any(left.values()) or free == 0
