"""Cutting a round's work into bundles, and how many workers take them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.config.models import TrainingSection
from fedllm.planning.quotas import largest_remainder
from fedllm.storage.records import BundleRecord, ClientRecord, CohortClient

_LARGEST_AUTO_BUNDLE = 8
# each leaves a claim and an update: admins ask for a few hundred files a folder at most
_MOST_AUTO_BUNDLES = 400


def training_cost(client: ClientRecord, training: TrainingSection) -> float:
    """Return the tokens that a client is expected to compute in a round."""
    rows = client.train_rows * training.epochs
    if training.max_steps is not None:
        rows = min(rows, training.max_steps * training.batch_size)
    return rows * client.train_tokens / max(1, client.train_rows)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The bundles of an attempt and the number of workers per class."""

    bundles: list[BundleRecord]
    workers: dict[str, int]


def cut_bundles(
    clients: Sequence[CohortClient],
    class_of_tier: Mapping[str, str],
    *,
    slots: int,
    clients_per_bundle: int | Literal["auto"],
) -> Workload:
    """Cut clients into bundles of one class each, costliest first.

    `auto` makes bundles smaller towards the end (half an even share of what is left), so that the
    workers of a class end together; there are 400 at most.
    """
    by_class: dict[str, list[CohortClient]] = {}
    for client in sorted(clients, key=lambda c: (-c.cost, c.id)):
        by_class.setdefault(class_of_tier[client.tier], []).append(client)
    workers = _workers(by_class, slots, clients_per_bundle)
    # every class has a last bundle that may be smaller
    smallest = math.ceil(len(clients) / max(1, _MOST_AUTO_BUNDLES - len(by_class)))
    bundles: list[BundleRecord] = []
    for name, members in sorted(by_class.items()):
        start = 0
        while start < len(members):
            size = _auto_size(len(members) - start, workers[name], smallest)
            if clients_per_bundle != "auto":
                size = clients_per_bundle
            taken = members[start : start + size]
            bundles.append(
                BundleRecord(
                    number=len(bundles),
                    worker_class=name,
                    clients=[c.id for c in taken],
                    cost=sum(c.cost for c in taken),
                )
            )
            start += size
    return Workload(bundles=bundles, workers=dict(sorted(workers.items())))


def _auto_size(left: int, workers: int, smallest: int) -> int:
    return max(smallest, min(_LARGEST_AUTO_BUNDLE, left // (2 * workers)))


def _workers(
    by_class: Mapping[str, Sequence[CohortClient]], slots: int, asked: int | Literal["auto"]
) -> dict[str, int]:
    """Give every class a worker and share the other slots out by cost.

    What a class cannot use, having few bundles, goes to the others.
    """
    cost = {name: sum(c.cost for c in members) or 1.0 for name, members in by_class.items()}
    most = {name: len(members) for name, members in by_class.items()}
    if asked != "auto":
        most = {name: math.ceil(count / asked) for name, count in most.items()}
    workers: dict[str, int] = {}
    while cost:
        others = max(0, slots - sum(workers.values()) - len(cost))
        wanted = {name: 1 + more for name, more in largest_remainder(cost, others).items()}
        full = [name for name in cost if wanted[name] >= most[name]]
        workers |= {name: min(most[name], wanted[name]) for name in full or cost}
        cost = {name: value for name, value in cost.items() if name not in workers}
    return workers
