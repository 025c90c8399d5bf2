"""Cutting a class's groups into bundles of decreasing size, costliest groups first."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.planning.grouping import ClientGroup
from fedllm.storage.records import BundleRecord, CohortClient

# Each bundle leaves a claim and an update: 10 s of work make their files cheap.
SMALLEST_BUNDLE_SECONDS = 10.0
# A bundle has this share of what a worker would have left...
_SHARE_OF_WORKER = 1 / 3
# ...and short work is still cut into so many bundles for each worker.
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
    """Cut groups of one class into bundles of their missing clients, numbered from `first`.

    A group stays whole. `auto` makes bundles smaller towards the end (a third of an even share of
    what is left, at least 10 s of work), so that workers end together.

    Args:
        groups: of one class.
        worker_class: its name.
        seconds: how long a client is expected to train.
        workers: how many take bundles at once.
        clients_per_bundle: a size in clients instead, for groups that are no larger.
        target_seconds: the work that a worker should have, which holds for bundles the more.
        first: the number of the first bundle.
    """
    works = [
        _Work(seconds=math.fsum(map(seconds, group.members)), clients=group.missing)
        for group in groups
    ]
    ordered = sorted(works, key=lambda work: (-work.seconds, work.clients))
    if clients_per_bundle == "auto":
        cuts = _guided(ordered, workers, target_seconds)
    else:
        cuts = _of_size(ordered, clients_per_bundle)
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
    """What training one group takes, and whom it is for."""

    seconds: float
    clients: tuple[str, ...]


def _of_size(ordered: Sequence[_Work], size: int) -> list[list[_Work]]:
    cuts: list[list[_Work]] = []
    room = 0
    for work in ordered:
        if len(work.clients) > room:
            cuts.append([])
            room = size
        cuts[-1].append(work)
        room -= len(work.clients)
    return cuts


def _guided(ordered: Sequence[_Work], workers: int, target_seconds: float) -> list[list[_Work]]:
    left = math.fsum(work.seconds for work in ordered)
    smallest = min(SMALLEST_BUNDLE_SECONDS, left / (_BUNDLES_PER_WORKER * workers))
    cuts: list[list[_Work]] = []
    held = wanted = 0.0
    for work in ordered:
        # a group goes where it overshoots less
        if not cuts or held + work.seconds / 2 > wanted:
            left -= held
            wanted = max(smallest, min(left / workers, target_seconds) * _SHARE_OF_WORKER)
            cuts.append([])
            held = 0.0
        cuts[-1].append(work)
        held += work.seconds
    return cuts
