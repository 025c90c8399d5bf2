"""Bootstrap intervals of a mean over clients: clients of a cluster are drawn together.

Clients of one category resemble each other, so the category is drawn, not the client (Cameron,
Gelbach and Miller 2008, Rev. Econ. Stat. 90(3)). All intervals are percentile intervals: with few
clusters or few seeds they are too narrow.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    sums = _cluster_sums([values], clusters)
    if len(sums) < 2:
        return None
    draw = random.Random(seed_of("cluster bootstrap", resamples, len(sums)))
    parts = [(total[0], count) for total, count in sums]
    means = []
    for _ in range(resamples):
        drawn = draw.choices(parts, k=len(parts))
        means.append(sum(part[0] for part in drawn) / sum(part[1] for part in drawn))
    return _percentiles(means)


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
    sums = _cluster_sums(values, clusters)
    if len(values) < 2 or len(sums) < 2:
        return None
    draw = random.Random(seed_of("two-level bootstrap", resamples, len(values), len(sums)))
    seeds = range(len(values))
    means = []
    for _ in range(resamples):
        of_seeds = draw.choices(seeds, k=len(seeds))
        drawn = draw.choices(sums, k=len(sums))
        count = sum(part[1] for part in drawn)
        means.append(sum(part[0][s] for part in drawn for s in of_seeds) / (count * len(seeds)))
    return _percentiles(means)


def _cluster_sums(
    values: Sequence[Mapping[str, float]], clusters: Mapping[str, str]
) -> list[tuple[list[float], int]]:
    """Return for every cluster the sum of its clients under every seed, and their number."""
    members: dict[str, list[str]] = {}
    for client in sorted(values[0]):
        members.setdefault(clusters[client], []).append(client)
    return [
        ([sum(of_seed[client] for client in clients) for of_seed in values], len(clients))
        for _, clients in sorted(members.items())
    ]


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
