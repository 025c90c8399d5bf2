"""Bundles: all clients once, one class each, the costliest first, and workers for all."""

import math
import random
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.planning.bundles import Workload, cut_bundles, training_cost
from fedllm.storage.records import CohortClient
from tests.planning.federations import client, config_of

CLASSES = {"t1": "t1", "t2": "t1", "t3": "t3", "t4": "t4"}
Size = int | Literal["auto"]
SIZES = st.integers(1, 9) | st.just("auto")


@st.composite
def cohorts(draw: st.DrawFn) -> list[CohortClient]:
    ids = draw(st.lists(st.text(max_size=5), min_size=1, max_size=60, unique=True))
    costs = st.one_of(st.just(0.0), st.floats(0, 1e6), st.sampled_from([1.0, 2.0]))
    return [
        CohortClient(id=id_, tier=draw(st.sampled_from(sorted(CLASSES))), cost=draw(costs))
        for id_ in ids
    ]


def cut(clients: list[CohortClient], slots: int = 4, size: Size = "auto") -> Workload:
    return cut_bundles(clients, CLASSES, slots=slots, clients_per_bundle=size)


@given(clients=cohorts(), slots=st.integers(1, 20), size=SIZES)
def test_every_client_is_in_exactly_one_bundle_and_a_bundle_is_of_one_class(
    clients: list[CohortClient], slots: int, size: Size
) -> None:
    bundles = cut(clients, slots, size).bundles
    assert sorted(id_ for b in bundles for id_ in b.clients) == sorted(c.id for c in clients)
    assert [b.number for b in bundles] == list(range(len(bundles)))
    class_of = {c.id: CLASSES[c.tier] for c in clients}
    for bundle in bundles:
        assert {class_of[id_] for id_ in bundle.clients} == {bundle.worker_class}
        assert size == "auto" or len(bundle.clients) <= size


@given(clients=cohorts(), slots=st.integers(1, 20), size=SIZES)
def test_the_costliest_clients_of_a_class_come_first_and_bundles_shrink(
    clients: list[CohortClient], slots: int, size: Size
) -> None:
    cost = {c.id: c.cost for c in clients}
    for name in set(CLASSES.values()):
        bundles = [b for b in cut(clients, slots, size).bundles if b.worker_class == name]
        costs = [cost[id_] for bundle in bundles for id_ in bundle.clients]
        assert costs == sorted(costs, reverse=True)
        assert all(len(b.clients) >= len(after.clients) for b, after in pairwise(bundles))
        for bundle in bundles:
            assert bundle.cost == pytest.approx(sum(cost[id_] for id_ in bundle.clients))


@given(clients=cohorts(), order=st.randoms(), slots=st.integers(1, 20), size=SIZES)
def test_bundles_do_not_depend_on_the_order_of_the_clients(
    clients: list[CohortClient], order: random.Random, slots: int, size: Size
) -> None:
    shuffled = list(clients)
    order.shuffle(shuffled)
    assert cut(shuffled, slots, size) == cut(clients, slots, size)


@given(clients=cohorts(), slots=st.integers(1, 40), size=SIZES)
def test_every_class_has_a_worker_none_has_more_than_bundles_and_slots_are_used(
    clients: list[CohortClient], slots: int, size: Size
) -> None:
    work = cut(clients, slots, size)
    members: dict[str, int] = {}
    for c in clients:
        members[CLASSES[c.tier]] = members.get(CLASSES[c.tier], 0) + 1
    most = {
        name: count if size == "auto" else math.ceil(count / size)
        for name, count in members.items()
    }
    assert work.workers.keys() == most.keys()
    assert all(1 <= work.workers[name] <= most[name] for name in most)
    # as many as there are slots, unless there is less to do, or every class needs one
    assert sum(work.workers.values()) == max(len(most), min(slots, sum(most.values())))


def test_slots_that_a_costly_class_cannot_use_go_to_the_others() -> None:
    clients = [CohortClient(id="one", tier="t4", cost=1e6)]
    clients += [CohortClient(id=str(n), tier="t1", cost=1.0) for n in range(40)]
    assert cut(clients, 16).workers == {"t1": 15, "t4": 1}


def test_workers_are_shared_out_by_cost() -> None:
    clients = [CohortClient(id=f"a{n}", tier="t1", cost=3.0) for n in range(20)]
    clients += [CohortClient(id=f"b{n}", tier="t3", cost=1.0) for n in range(20)]
    assert cut(clients, 10).workers == {"t1": 7, "t3": 3}


@given(count=st.integers(1, 3000), slots=st.integers(1, 500))
def test_a_round_of_any_size_leaves_at_most_a_few_hundred_files_a_folder(
    count: int, slots: int
) -> None:
    tiers = sorted(CLASSES)
    clients = [CohortClient(id=str(n), tier=tiers[n % len(tiers)], cost=1.0) for n in range(count)]
    assert len(cut(clients, slots).bundles) <= 400


def test_the_last_bundles_are_small_so_that_workers_end_together() -> None:
    clients = [CohortClient(id=f"{n:03}", tier="t1", cost=1.0) for n in range(100)]
    sizes = [len(bundle.clients) for bundle in cut(clients, 2).bundles]
    assert sizes[0] == 8
    assert sizes[-4:] == [1, 1, 1, 1]


def test_the_cost_of_a_client_is_the_tokens_it_will_compute() -> None:
    ten_rows = client("a", train=10)
    assert ten_rows.train_tokens == 70
    assert training_cost(ten_rows, config_of(training__epochs=2).training) == 140
    limited = config_of(training__max_steps=2, training__batch_size=3).training
    assert training_cost(ten_rows, limited) == 42
    unlimited = config_of(training__max_steps=200, training__batch_size=3).training
    assert training_cost(ten_rows, unlimited) == 70
    assert training_cost(client("silent", train=0), limited) == 0
