"""Groups depend only on the cohort, and their members are similar."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.planning.engines import Engine, group_clients, job_size, scoring_engine
from fedllm.storage.records import CohortClient

Ranks = dict[str, dict[str, int]]


@st.composite
def tiers(draw: st.DrawFn) -> Ranks:
    rank = st.integers(1, 40)
    return {
        tier: {"q": draw(rank), "up": draw(rank)}
        for tier in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
    }


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[CohortClient], Ranks]:
    ranks = draw(tiers())
    ids = draw(st.lists(st.text(max_size=4), min_size=1, max_size=40, unique=True))
    costs = st.floats(0, 1e6) | st.sampled_from([1.0, 2.0])
    return [
        CohortClient(id=id_, tier=draw(st.sampled_from(sorted(ranks))), cost=draw(costs))
        for id_ in ids
    ], ranks


@given(cohort=cohorts(), size=st.integers(1, 6))
def test_every_client_is_in_one_group_of_at_most_the_size_and_of_similar_ranks(
    cohort: tuple[list[CohortClient], Ranks], size: int
) -> None:
    clients, ranks = cohort
    groups = group_clients(clients, ranks, size)
    assert sorted(id_ for group in groups for id_ in group.clients) == sorted(c.id for c in clients)
    for group in groups:
        assert 1 <= len(group.members) <= size
        assert group.missing == group.clients
        for module in ("q", "up"):
            found = [ranks[member.tier][module] for member in group.members]
            assert max(found) <= 2 * min(found)
        mixed = {member.tier: ranks[member.tier].values() for member in group.members}
        sizes = {tier: (max(each), sum(each)) for tier, each in mixed.items()}
        assert sizes[group.tier] == max(sizes.values())


@given(cohort=cohorts(), size=st.integers(1, 6), order=st.randoms())
def test_groups_do_not_depend_on_the_order_of_the_cohort(
    cohort: tuple[list[CohortClient], Ranks], size: int, order: random.Random
) -> None:
    clients, ranks = cohort
    shuffled = list(clients)
    order.shuffle(shuffled)
    assert group_clients(shuffled, ranks, size) == group_clients(clients, ranks, size)


@given(cohort=cohorts())
def test_one_client_at_a_time_is_no_group(cohort: tuple[list[CohortClient], Ranks]) -> None:
    assert all(len(group.members) == 1 for group in group_clients(*cohort, 1))


def test_clients_of_similar_cost_are_together() -> None:
    clients = [CohortClient(id=str(n), tier="t", cost=float(n % 4)) for n in range(8)]
    groups = group_clients(clients, {"t": {"q": 2}}, 2)
    assert [[m.cost for m in group.members] for group in groups] == [[c] * 2 for c in (3, 2, 1, 0)]


def test_workers_are_those_of_the_larger_tier_whatever_clients_cost() -> None:
    ranks = {"bigmem": {"q": 8, "up": 8}, "smallmem": {"q": 8, "up": 4}}
    clients = [
        CohortClient(id=f"{tier}{n}", tier=tier, cost=cost)
        for tier, costs in {"bigmem": [9, 5, 4], "smallmem": [8, 7, 6, 3, 2]}.items()
        for n, cost in enumerate(costs)
    ]
    small, mixed = group_clients(clients, ranks, 4)
    assert ([m.cost for m in small.members], small.tier) == ([8, 7, 6, 3], "smallmem")
    assert ([m.cost for m in mixed.members], mixed.tier) == ([2, 9, 5, 4], "bigmem")


@pytest.mark.parametrize(
    ("other", "expected"), [({"q": 8}, 1), ({"q": 9}, 2), ({"q": 4, "up": 4}, 2), ({"up": 4}, 2)]
)
def test_ranks_may_be_twice_as_large_and_modules_are_the_same(
    other: dict[str, int], expected: int
) -> None:
    clients = [CohortClient(id=tier, tier=tier, cost=1.0) for tier in "ab"]
    assert len(group_clients(clients, {"a": {"q": 4}, "b": other}, 9)) == expected


def test_a_group_keeps_its_members_when_some_of_them_are_done() -> None:
    clients = [CohortClient(id=id_, tier="t", cost=1.0) for id_ in "abc"]
    (group,) = group_clients(clients, {"t": {"q": 2}}, 3)
    left = group.without({"b", "x"})
    assert (left.missing, left.clients) == (("a", "c"), ("a", "b", "c"))


PLAIN, TWO, FOUR = (
    Engine(name=name, processes=n, divides_base=n > 1)
    for name, n in (("plain", 1), ("zero", 2), ("zero", 4))
)


@pytest.mark.parametrize(
    ("engines", "processes"), [((PLAIN,), 1), ((TWO, PLAIN), 1), ((FOUR, TWO), 2), ((FOUR,), 4)]
)
def test_several_processes_score_where_no_process_has_the_whole_base(
    engines: tuple[Engine, ...], processes: int
) -> None:
    tiers = {str(number): engine for number, engine in enumerate(engines)}
    assert scoring_engine(tiers).processes == processes
    assert job_size("evaluate", tiers).processes == processes
    assert job_size("aggregate", tiers).processes == 1


def test_processes_with_a_whole_base_each_do_not_score_together() -> None:
    whole = Engine(name="zero", processes=2, divides_base=False)
    assert scoring_engine({"one": whole}).processes == 1
