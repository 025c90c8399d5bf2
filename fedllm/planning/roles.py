"""Roles of clients: train clients train; all others are only scored."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from fedllm.config.models import ClientsSection
from fedllm.errors import ConfigError, counted
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.seeding import seed_of
from fedllm.storage.records import ClientRecord, Group

_SHOWN = 12  # categories of an error
GROUPS: tuple[Group, ...] = get_args(Group)
# what people read of a group of clients
GROUP_WORDS: Mapping[str, str] = {
    "train": "training clients",
    "dev": "dev clients",
    "unseen": "unseen clients",
    "new_category": "clients of unseen categories",
}


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Client ids by role, in canonical (sorted) order; clients without usable rows have no role."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    unseen: tuple[str, ...]
    new_category: tuple[str, ...] = ()


def split_roles(section: ClientsSection, clients: Sequence[ClientRecord]) -> Roles:
    """Draw dev and unseen clients from the candidates, stratified by category.

    A client without training rows never trains, and may be dev or unseen. A client without test
    rows is never dev or unseen. The clients of `clients.unseen_categories` are neither.

    Raises:
        ConfigError: there are fewer candidates than `clients.dev` + `clients.unseen`, or no client
            of a category.
    """
    new = {c.id: c for c in clients if c.category in section.unseen_categories}
    _refuse_unknown(section, clients)
    candidates = [c for c in clients if c.held_out_candidate and c.test_rows and c.id not in new]
    count = section.dev + section.unseen
    if count > len(candidates):
        raise ConfigError(
            f"clients.dev + clients.unseen: got {count}, only "
            f"{counted(len(candidates), 'client')} of clients.held_out_from with test rows; lower "
            "the counts"
        )
    dev = _stratified(candidates, section.dev, section.split_seed, "dev")
    others = [c for c in candidates if c.id not in dev]
    unseen = _stratified(others, section.unseen, section.split_seed, "unseen")
    held_out = dev | unseen | new.keys()
    train = [c.id for c in clients if c.train_rows and c.id not in held_out]
    return Roles(
        train=tuple(sorted(train)),
        dev=tuple(sorted(dev)),
        unseen=tuple(sorted(unseen)),
        new_category=tuple(sorted(id_ for id_, client in new.items() if client.test_rows)),
    )


def _refuse_unknown(section: ClientsSection, clients: Sequence[ClientRecord]) -> None:
    known = {client.category for client in clients}
    unknown = [name for name in section.unseen_categories if name not in known]
    if unknown:
        shown = ", ".join(sorted(known)[:_SHOWN])
        raise ConfigError(
            f"clients.unseen_categories: no client of {unknown[0]!r}; the data has "
            f"{len(known)} categories: {shown}{', ...' if len(known) > _SHOWN else ''}"
        )


def _stratified(pool: Sequence[ClientRecord], count: int, seed: int, purpose: str) -> set[str]:
    if not count:
        return set()
    by_category: dict[str, list[str]] = {}
    for client in sorted(pool, key=lambda c: (c.category, c.id)):
        by_category.setdefault(client.category, []).append(client.id)
    sizes = {category: float(len(ids)) for category, ids in by_category.items()}
    chosen: set[str] = set()
    for category, number in largest_remainder(sizes, count).items():
        draw = random.Random(seed_of("split", seed, purpose, category))
        chosen.update(draw.sample(by_category[category], number))
    return chosen
