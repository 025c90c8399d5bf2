"""Bundles: all clients of a class once, the costliest first, smaller towards the end."""

import math
import random
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.planning.bundles import SMALLEST_BUNDLE_SECONDS, cut_bundles
from fedllm.planning.engines import ClientGroup, group_clients
from fedllm.storage.records import BundleRecord, CohortClient

Size = int | Literal["auto"]
SIZES = st.integers(1, 9) | st.just("auto")
RANKS = {"t": {"m": 4}}


@st.composite
def clients_of_a_class(draw: st.DrawFn) -> list[CohortClient]:
    ids = draw(st.lists(st.text(max_size=5), min_size=1, max_size=60, unique=True))
    costs = st.one_of(st.just(0.0), st.floats(0, 1e6), st.sampled_from([1.0, 2.0]))
    return [CohortClient(id=id_, tier="t", cost=draw(costs)) for id_ in ids]


def seconds(client: CohortClient) -> float:
    return client.cost


def cut(
    clients: list[CohortClient], workers: int = 4, size: Size = "auto", together: int = 1
) -> list[BundleRecord]:
    return cut_bundles(
        group_clients(clients, RANKS, together),
        worker_class="t",
        seconds=seconds,
        workers=workers,
        clients_per_bundle=size,
    )


@given(clients=clients_of_a_class(), workers=st.integers(1, 20), size=SIZES)
def test_every_client_is_in_exactly_one_bundle(
    clients: list[CohortClient], workers: int, size: Size
) -> None:
    bundles = cut(clients, workers, size)
    assert sorted(id_ for b in bundles for id_ in b.clients) == sorted(c.id for c in clients)
    assert [b.number for b in bundles] == list(range(len(bundles)))
    assert all(b.clients and (size == "auto" or len(b.clients) <= size) for b in bundles)


@given(clients=clients_of_a_class(), workers=st.integers(1, 20), size=SIZES)
def test_the_costliest_clients_come_first(
    clients: list[CohortClient], workers: int, size: Size
) -> None:
    cost = {c.id: c.cost for c in clients}
    bundles = cut(clients, workers, size)
    costs = [cost[id_] for bundle in bundles for id_ in bundle.clients]
    assert costs == sorted(costs, reverse=True)
    for bundle in bundles:
        assert bundle.cost == pytest.approx(sum(cost[id_] for id_ in bundle.clients))


@given(clients=clients_of_a_class(), order=st.randoms(), workers=st.integers(1, 20), size=SIZES)
def test_bundles_do_not_depend_on_the_order_of_the_clients(
    clients: list[CohortClient], order: random.Random, workers: int, size: Size
) -> None:
    shuffled = list(clients)
    order.shuffle(shuffled)
    assert cut(shuffled, workers, size) == cut(clients, workers, size)


@given(count=st.integers(1, 3000), workers=st.integers(1, 300), cost=st.floats(0.01, 600))
def test_bundles_shrink_and_none_is_too_small_for_its_files(
    count: int, workers: int, cost: float
) -> None:
    clients = [CohortClient(id=f"{n:04}", tier="t", cost=cost) for n in range(count)]
    bundles = cut(clients, workers)
    assert all(b.cost >= after.cost - 1e-6 for b, after in pairwise(bundles[:-1]))
    enough = min(SMALLEST_BUNDLE_SECONDS, count * cost / (8 * workers))
    # a client joins a bundle if at least half of it fits, so half of one may be missing
    assert all(b.cost + cost / 2 >= enough - 1e-6 for b in bundles[:-1])


@given(count=st.integers(1, 3000), workers=st.integers(1, 64))
def test_workers_that_take_the_next_bundle_end_together(count: int, workers: int) -> None:
    draw = random.Random(count)
    clients = [
        CohortClient(id=str(n), tier="t", cost=draw.lognormvariate(3, 1)) for n in range(count)
    ]
    ends = [0.0] * workers
    for bundle in cut(clients, workers):
        ends.sort()
        ends[0] += bundle.cost
    total, longest = sum(c.cost for c in clients), max(c.cost for c in clients)
    # Graham's bound, with the smallest bundle in place of the smallest client
    assert max(ends) <= total / workers + max(longest, SMALLEST_BUNDLE_SECONDS) + 1e-6


def test_the_last_bundles_are_small() -> None:
    clients = [CohortClient(id=f"{n:03}", tier="t", cost=10.0) for n in range(100)]
    sizes = [len(bundle.clients) for bundle in cut(clients, 2)]
    assert sizes[0] == 17
    assert sizes[-4:] == [1, 1, 1, 1]


def test_a_class_goes_on_with_the_numbers_of_the_one_before() -> None:
    clients = [CohortClient(id=str(n), tier="t", cost=1.0) for n in range(4)]
    bundles = cut_bundles(
        group_clients(clients, RANKS, 1),
        worker_class="t",
        seconds=seconds,
        workers=1,
        clients_per_bundle=2,
        first=7,
    )
    assert [bundle.number for bundle in bundles] == [7, 8]


@given(
    clients=clients_of_a_class(),
    workers=st.integers(1, 20),
    size=SIZES,
    together=st.integers(2, 5),
    done=st.sets(st.integers(0, 59)),
)
def test_a_group_stays_whole_and_costs_all_its_members_though_some_are_done(
    clients: list[CohortClient], workers: int, size: Size, together: int, done: set[int]
) -> None:
    published = {client.id for n, client in enumerate(clients) if n in done}
    groups = [g.without(published) for g in group_clients(clients, RANKS, together)]
    groups = [group for group in groups if group.missing]
    bundles = cut_bundles(
        groups, worker_class="t", seconds=seconds, workers=workers, clients_per_bundle=size
    )
    found = sorted(id_ for bundle in bundles for id_ in bundle.clients)
    assert found == sorted(client.id for client in clients if client.id not in published)
    for bundle in bundles:
        inside = [group for group in groups if group.missing[0] in bundle.clients]
        assert bundle.clients == [i for g in sorted_by_cost(inside) for i in g.missing]
        assert bundle.cost == pytest.approx(sum(m.cost for g in inside for m in g.members))
        most = max(len(group.missing) for group in groups)
        assert size == "auto" or len(bundle.clients) <= max(size, most)


def sorted_by_cost(groups: list[ClientGroup]) -> list[ClientGroup]:
    return sorted(groups, key=lambda g: (-math.fsum(m.cost for m in g.members), g.missing))
