"""Bootstrap intervals of a mean over clients: clients of a cluster are drawn together.

Clients of one category resemble each other, so the category is drawn, not the client (Cameron,
Gelbach and Miller 2008, Rev. Econ. Stat. 90(3)). All intervals are percentile intervals: with few
clusters or few seeds they are too narrow.
"""

import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedllm.planning.seeding import seed_of

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The interval from `low` to `high`."""

    low: float
    high: float


def cluster_bootstrap(
    values: Mapping[str, float], clusters: Mapping[str, str], *, resamples: int = RESAMPLES
) -> Interval | None:
    """Return the interval of the mean of `values` over clients; None: there is one cluster only.

    Args:
        values: client -> value.
        clusters: client -> its cluster.
        resamples: the number of samples drawn.
    """
    sums, counts = _cluster_sums([values], clusters)
    if len(counts) < 2:
        return None
    (of_seed,) = sums
    return _percentiles(
        [
            _sum_at(of_seed, drawn) / _sum_at(counts, drawn)
            for drawn in _samples("clusters", len(counts), resamples)
        ]
    )


def two_level_bootstrap(
    values: Sequence[Mapping[str, float]],
    clusters: Mapping[str, str],
    *,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Return the interval of the mean over seeds and clients; None: fewer than two of either.

    The same clients are scored under every seed, so both are drawn, each for itself: the variance
    is at least that of seeds and clients together (Owen 2007, Ann. Appl. Stat. 1(2)).

    Args:
        values: for every seed, client -> value; the clients are the same.
        clusters: client -> its cluster.
        resamples: the number of samples drawn.
    """
    sums, counts = _cluster_sums(values, clusters)
    if len(values) < 2 or len(counts) < 2:
        return None
    means = []
    for seeds, drawn in zip(
        _samples("seeds", len(values), resamples),
        _samples("clusters", len(counts), resamples),
        strict=True,
    ):
        times_of_seeds = Counter(seeds).items()
        total = sum(times * _sum_at(sums[seed], drawn) for seed, times in times_of_seeds)
        means.append(total / (_sum_at(counts, drawn) * len(values)))
    return _percentiles(means)


def _cluster_sums(
    values: Sequence[Mapping[str, float]], clusters: Mapping[str, str]
) -> tuple[list[list[float]], list[int]]:
    """Return for every seed the sums of all clusters, and the clusters' numbers of clients."""
    members: dict[str, list[str]] = {}
    for client in sorted(values[0]):
        members.setdefault(clusters[client], []).append(client)
    ordered = [clients for _, clients in sorted(members.items())]
    sums = [[sum(map(of_seed.__getitem__, clients)) for clients in ordered] for of_seed in values]
    return sums, list(map(len, ordered))


@lru_cache(maxsize=4)
def _samples(what: str, count: int, resamples: int) -> list["array[int]"]:
    """Return the places drawn with replacement in every sample, the same for every contrast."""
    draw = random.Random(seed_of("bootstrap", what, count))
    return [array("I", draw.choices(range(count), k=count)) for _ in range(resamples)]


def _sum_at(values: Sequence[float], places: Sequence[int]) -> float:
    return sum(map(values.__getitem__, places))


def _percentiles(means: list[float]) -> Interval:
    means.sort()
    tail = (1.0 - CONFIDENCE) / 2
    return Interval(low=quantile(means, tail), high=quantile(means, 1.0 - tail))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of sorted values, linear between two neighbours."""
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
