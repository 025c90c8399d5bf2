"""Bundles of a class: its groups cut into bundles of decreasing size, costliest groups first."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedllm.planning.engines import ClientGroup
from fedllm.storage.records import BundleRecord, CohortClient

Item = TypeVar("Item")

# Each bundle writes a claim and an update; next to 10 s of work these files cost little.
SMALLEST_BUNDLE_SECONDS = 10.0
# A bundle has this share of an even share of the remaining work.
_SHARE_OF_WORKER = 1 / 3
# Short work is still cut into this many bundles per worker.
_BUNDLES_PER_WORKER = 8


def cut_bundles(
    groups: Sequence[ClientGroup],
    *,
    worker_class: str,
    seconds: Callable[[CohortClient], float],
    workers: int,
    clients_per_bundle: int | Literal["auto"],
    target_seconds: float = math.inf,
    first: int = 0,
) -> list[BundleRecord]:
    """Cut groups of one class into bundles of their missing clients.

    A group is never split. `auto` makes later bundles smaller, so that workers end together: each
    has a third of an even share of the remaining work, and at least 10 s of work.

    Args:
        groups: groups of one class.
        worker_class: name of the class.
        seconds: client -> expected seconds of training.
        workers: number of workers that claim bundles at once.
        clients_per_bundle: clients of a bundle, at least those of a group; or `auto`.
        target_seconds: upper limit of the share of a worker, in seconds of work.
        first: number of the first bundle.

    Returns:
        The bundles, numbered from `first`, in the order in which workers claim them.
    """
    works = [
        _Work(seconds=math.fsum(map(seconds, group.members)), clients=group.missing)
        for group in groups
    ]
    ordered = sorted(works, key=lambda work: (-work.seconds, work.clients))
    if clients_per_bundle == "auto":
        cuts = _guided(ordered, workers, target_seconds)
    else:
        cuts = cut_in_order(ordered, lambda work: len(work.clients), clients_per_bundle)
    return [
        BundleRecord(
            number=number,
            worker_class=worker_class,
            clients=[id_ for work in cut for id_ in work.clients],
            cost=math.fsum(work.seconds for work in cut),
        )
        for number, cut in enumerate(cuts, first)
    ]


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The work of one group: expected seconds and missing clients."""

    seconds: float
    clients: tuple[str, ...]


def cut_in_order(
    items: Sequence[Item], size_of: Callable[[Item], int], most: int
) -> list[list[Item]]:
    """Cut items into parts of the size `most` or less; a larger item is a part of its own."""
    parts: list[list[Item]] = []
    room = 0
    for item in items:
        if size_of(item) > room:
            parts.append([])
            room = most
        parts[-1].append(item)
        room -= size_of(item)
    return parts


def _guided(ordered: Sequence[_Work], workers: int, target_seconds: float) -> list[list[_Work]]:
    remaining = math.fsum(work.seconds for work in ordered)
    min_seconds = min(SMALLEST_BUNDLE_SECONDS, remaining / (_BUNDLES_PER_WORKER * workers))
    cuts: list[list[_Work]] = []
    bundle_seconds = target = 0.0
    for work in ordered:
        # a group joins the bundle if at least half of it fits
        if not cuts or bundle_seconds + work.seconds / 2 > target:
            remaining -= bundle_seconds
            share = min(remaining / workers, target_seconds)
            target = max(min_seconds, share * _SHARE_OF_WORKER)
            cuts.append([])
            bundle_seconds = 0.0
        cuts[-1].append(work)
        bundle_seconds += work.seconds
    return cuts
