"""Cutting a round's work into bundles, and how many workers take them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.config.models import TrainingSection
from fedllm.planning.quotas import largest_remainder
from fedllm.storage.records import BundleRecord, ClientRecord, CohortClient

_LARGEST_AUTO_BUNDLE = 8


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

    `auto` makes bundles smaller towards the end (a quarter of an even share of what is left), so
    that the workers of a class end together.
    """
    by_class: dict[str, list[CohortClient]] = {}
    for client in sorted(clients, key=lambda c: (-c.cost, c.id)):
        by_class.setdefault(class_of_tier[client.tier], []).append(client)
    workers = _workers(by_class, slots)
    bundles: list[BundleRecord] = []
    for name, members in sorted(by_class.items()):
        start = 0
        while start < len(members):
            size = _size(len(members) - start, workers[name], clients_per_bundle)
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


def _size(left: int, workers: int, asked: int | Literal["auto"]) -> int:
    if asked != "auto":
        return asked
    return max(1, min(_LARGEST_AUTO_BUNDLE, left // (2 * workers)))


def _workers(by_class: Mapping[str, Sequence[CohortClient]], slots: int) -> dict[str, int]:
    cost = {name: sum(c.cost for c in members) or 1.0 for name, members in by_class.items()}
    shares = largest_remainder(cost, slots)
    # every class needs a worker of its own, whatever its share
    return {name: max(1, min(shares[name], len(by_class[name]))) for name in by_class}
