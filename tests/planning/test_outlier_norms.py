"""Laws of outliers: sizes are compared with the median of clients that change the module."""

import math
from statistics import median_high

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.planning.outlier_norms import Outlier, UpdateSizes, find_outliers, size_bound

MODULES = ("layer.q_proj", "layer.up_proj")
Round = dict[str, tuple[float, float]]

sizes_of_a_module = st.one_of(
    st.just(0.0), st.floats(1e-12, 1e12), st.sampled_from([1.0, 1.5, 2.0, 30.0, 1e3])
)
rounds = st.lists(st.tuples(sizes_of_a_module, sizes_of_a_module), max_size=9).map(
    lambda sizes: {f"client {n}": pair for n, pair in enumerate(sizes)}
)
factors = st.sampled_from([1.001, 1.5, 2.0, 10.0, 1e4])


def outliers(clients: Round, factor: float) -> dict[str, list[Outlier]]:
    return find_outliers(
        [
            UpdateSizes(client=name, modules=MODULES, values=sizes)
            for name, sizes in clients.items()
        ],
        factor=factor,
    )


def places(found: dict[str, list[Outlier]]) -> set[tuple[str, str]]:
    return {(client, outlier.module) for client, listed in found.items() for outlier in listed}


def size_of(clients: Round, place: tuple[str, str]) -> float:
    return clients[place[0]][MODULES.index(place[1])]


@given(rounds, factors)
def test_outliers_are_those_above_the_factor_times_the_median_and_no_others(
    clients: Round, factor: float
) -> None:
    found = outliers(clients, factor)
    for place, module in enumerate(MODULES):
        changing = [sizes[place] for sizes in clients.values() if sizes[place]]
        limit = factor * median_high(changing) if changing else math.inf
        above = {name for name, sizes in clients.items() if sizes[place] > limit}
        assert {client for client, at in places(found) if at == module} == above
        assert 2 * len(above) < max(1, len(changing))


@given(rounds, factors, st.randoms())
def test_the_order_of_clients_does_not_matter(clients: Round, factor: float, order: object) -> None:
    listed = list(clients.items())
    order.shuffle(listed)  # type: ignore[attr-defined]
    assert outliers(dict(listed), factor) == outliers(clients, factor)


@given(st.lists(st.floats(1.0, 10.0), max_size=9))
def test_sizes_within_the_factor_are_no_outliers(sizes: list[float]) -> None:
    clients = {f"client {n}": (size, size) for n, size in enumerate(sizes)}
    assert outliers(clients, 10.0) == {}


@given(rounds, factors, st.sampled_from([2.0**-20, 2.0**20]))
def test_the_unit_of_sizes_does_not_matter(clients: Round, factor: float, unit: float) -> None:
    scaled = {name: (unit * q, unit * up) for name, (q, up) in clients.items()}
    found, other = outliers(clients, factor), outliers(scaled, factor)
    assert places(found) == places(other)
    for client, listed in found.items():
        assert [o.clip for o in listed] == [o.clip for o in other[client]]


@given(rounds, factors, factors)
def test_a_larger_factor_finds_no_more_and_clips_no_more(
    clients: Round, one: float, two: float
) -> None:
    low, high = sorted((one, two))
    strict, mild = outliers(clients, low), outliers(clients, high)
    assert places(mild) <= places(strict)
    clips = {(o.client, o.module): o.clip for listed in strict.values() for o in listed}
    for listed in mild.values():
        assert all(o.clip >= clips[o.client, o.module] for o in listed)


@given(rounds, factors, st.floats(1.0, 1e6))
def test_an_outlier_that_grows_stays_one_and_changes_nothing_for_others(
    clients: Round, factor: float, growth: float
) -> None:
    found = outliers(clients, factor)
    for client, module in places(found):
        q, up = clients[client]
        grown = (growth * q, up) if module == MODULES[0] else (q, growth * up)
        other = outliers({**clients, client: grown}, factor)
        assert places(other) == places(found)
        (now,) = [o for o in other[client] if o.module == module]
        (was,) = [o for o in found[client] if o.module == module]
        assert now.limit == was.limit
        assert now.clip <= was.clip


@given(rounds, factors)
def test_a_clipped_change_is_at_its_limit_and_no_outlier(clients: Round, factor: float) -> None:
    found = outliers(clients, factor)
    clips = {(o.client, o.module): o for listed in found.values() for o in listed}
    for place, outlier in clips.items():
        assert 0 < outlier.clip < 1
        assert outlier.clip * size_of(clients, place) == pytest.approx(outlier.limit)
    clipped = {
        name: tuple(
            min(size, clips[name, module].limit) if (name, module) in clips else size
            for module, size in zip(MODULES, sizes, strict=True)
        )
        for name, sizes in clients.items()
    }
    assert outliers(clipped, factor) == {}  # type: ignore[arg-type]


def test_clients_that_change_nothing_make_no_outlier_of_the_others() -> None:
    nothing = {f"client {n}": (0.0, 0.0) for n in range(5)}
    assert outliers(nothing, 10.0) == {}
    assert outliers({**nothing, "one": (1.0, 1.0)}, 10.0) == {}
    trained = {f"trained {n}": (1.0, 1.0) for n in range(3)}
    assert places(outliers({**nothing, **trained, "far": (1.0, 11.0)}, 10.0)) == {
        ("far", MODULES[1])
    }


def test_the_worst_module_of_a_client_is_named_first_with_its_value_median_and_limit() -> None:
    clients = {"a": (1.0, 1.0), "b": (1.0, 1.0), "c": (1.0, 1.0), "d": (20.0, 30.0)}
    worst, other = outliers(clients, 10.0)["d"]
    assert (worst.module, other.module) == ("layer.up_proj", "layer.q_proj")
    assert str(worst) == (
        "layer.up_proj changes by up to 30, need at most 10 "
        "(aggregation.outlier_factor times the median 1)"
    )


@given(
    st.floats(-100, 100), st.lists(st.floats(-10, 10), min_size=1, max_size=4), st.floats(-10, 10)
)
def test_the_bound_of_a_change_is_reached_where_its_factors_are_of_one_rank(
    scale: float, row: list[float], value: float
) -> None:
    change = math.sqrt(sum((scale * value * entry) ** 2 for entry in row))
    bound = size_bound(scale=scale, norms=(math.hypot(*row), abs(value)))
    assert bound == pytest.approx(change, rel=1e-9, abs=1e-100)


def test_clients_may_change_different_modules() -> None:
    sizes = [
        UpdateSizes(client="a", modules=("x",), values=[1.0]),
        UpdateSizes(client="b", modules=("x", "y"), values=[1.0, 500.0]),
        UpdateSizes(client="c", modules=("x",), values=[100.0]),
    ]
    assert places(find_outliers(sizes, factor=10.0)) == {("c", "x")}
