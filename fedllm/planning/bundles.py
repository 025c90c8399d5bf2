"""Cutting a class's clients into bundles of decreasing size, costliest clients first."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from fedllm.storage.records import BundleRecord, CohortClient

# Each bundle leaves a claim and an update: 10 s of work make their files cheap.
SMALLEST_BUNDLE_SECONDS = 10.0
# A bundle has this share of what a worker would have left...
_SHARE_OF_WORKER = 1 / 3
# ...and short work is still cut into so many bundles for each worker.
_BUNDLES_PER_WORKER = 8


def cut_bundles(
    clients: Sequence[CohortClient],
    *,
    worker_class: str,
    seconds: Callable[[CohortClient], float],
    workers: int,
    clients_per_bundle: int | Literal["auto"],
    target_seconds: float = math.inf,
    first: int = 0,
) -> list[BundleRecord]:
    """Cut clients of one class into bundles, numbered from `first`.

    `auto` makes them smaller towards the end (a third of an even share of what is left, at least
    10 s of work), so that workers end together.

    Args:
        clients: of one class.
        worker_class: its name.
        seconds: how long a client is expected to train.
        workers: how many take bundles at once.
        clients_per_bundle: a size in clients instead.
        target_seconds: the work that a worker should have, which holds for bundles the more.
        first: the number of the first bundle.
    """
    ordered = sorted(((seconds(c), c.id) for c in clients), key=lambda pair: (-pair[0], pair[1]))
    if clients_per_bundle == "auto":
        cuts = _guided(ordered, workers, target_seconds)
    else:
        size = clients_per_bundle
        cuts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    return [
        BundleRecord(
            number=number,
            worker_class=worker_class,
            clients=[id_ for _, id_ in cut],
            cost=math.fsum(cost for cost, _ in cut),
        )
        for number, cut in enumerate(cuts, first)
    ]


def _guided(
    ordered: Sequence[tuple[float, str]], workers: int, target_seconds: float
) -> list[list[tuple[float, str]]]:
    left = math.fsum(cost for cost, _ in ordered)
    smallest = min(SMALLEST_BUNDLE_SECONDS, left / (_BUNDLES_PER_WORKER * workers))
    cuts: list[list[tuple[float, str]]] = []
    held = wanted = 0.0
    for cost, id_ in ordered:
        # a client goes where it overshoots less
        if not cuts or held + cost / 2 > wanted:
            left -= held
            wanted = max(smallest, min(left / workers, target_seconds) * _SHARE_OF_WORKER)
            cuts.append([])
            held = 0.0
        cuts[-1].append((cost, id_))
        held += cost
    return cuts
