"""Intervals of a mean over clients: laws, and examples that can be worked out."""

from fedllm.statistics.intervals import (
    Interval,
    cluster_bootstrap,
    quantile,
    two_level_bootstrap,
)


def spread(interval: Interval | None) -> float:
    assert interval is not None
    return interval.high - interval.low


def test_a_quantile_is_linear_between_two_neighbours() -> None:
    assert quantile([0.0, 10.0], 0.25) == 2.5
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 1.0) == 4.0
    assert quantile([3.0], 0.975) == 3.0


def test_two_clusters_are_both_one_or_the_other() -> None:
    # of the 4 draws of two clusters a quarter is all 0 and a quarter all 1
    values = {"a": 0.0, "b": 1.0}
    assert cluster_bootstrap(values, {"a": "x", "b": "y"}) == Interval(low=0.0, high=1.0)


def test_equal_clients_have_an_interval_of_one_point() -> None:
    values = dict.fromkeys("abcd", 0.5)
    assert cluster_bootstrap(values, dict(zip("abcd", "abcd", strict=True))) == Interval(
        low=0.5, high=0.5
    )


def test_one_cluster_or_one_seed_has_no_interval() -> None:
    values = {"a": 0.0, "b": 1.0}
    assert cluster_bootstrap(values, {"a": "x", "b": "x"}) is None
    assert two_level_bootstrap([values], {"a": "a", "b": "b"}) is None
    assert two_level_bootstrap([values, values], {"a": "x", "b": "x"}) is None


def test_clients_of_a_cluster_count_as_the_few_that_they_are() -> None:
    values = {f"{n}": float(n % 2) for n in range(40)}
    alone = cluster_bootstrap(values, {client: client for client in values})
    together = cluster_bootstrap(values, {c: f"{int(c) % 4}" for c in values})
    assert spread(together) > 1.5 * spread(alone)


def test_seeds_that_differ_widen_the_interval_of_the_clients() -> None:
    clients = {f"{n}": 0.1 * (n % 3) for n in range(30)}
    clusters = {client: client for client in clients}
    seeds = [{client: value + shift for client, value in clients.items()} for shift in (-1, 0, 1)]
    both = two_level_bootstrap(seeds, clusters)
    assert spread(both) > 3 * spread(cluster_bootstrap(clients, clusters))
    assert both is not None and both.low < 0.1 < both.high


def test_the_same_values_have_the_same_interval() -> None:
    values = {f"{n}": n / 7 for n in range(9)}
    clusters = {client: client for client in values}
    assert cluster_bootstrap(values, clusters) == cluster_bootstrap(values, clusters)
