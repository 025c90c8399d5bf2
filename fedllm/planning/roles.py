"""Roles of clients: train clients train; dev and unseen clients are only scored."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.config.models import ClientsSection
from fedllm.errors import ConfigError
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.seeding import seed_of
from fedllm.storage.records import ClientRecord


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Client ids by role, in canonical (sorted) order; clients without usable rows have no role."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    unseen: tuple[str, ...]


def split_roles(section: ClientsSection, clients: Sequence[ClientRecord]) -> Roles:
    """Draw dev and unseen clients from the candidates, stratified by category.

    A client without training rows never trains, and may be dev or unseen. A client without test
    rows is never dev or unseen.

    Raises:
        ConfigError: there are fewer candidates than `clients.dev` + `clients.unseen`.
    """
    candidates = [c for c in clients if c.held_out_candidate and c.test_rows]
    count = section.dev + section.unseen
    if count > len(candidates):
        raise ConfigError(
            f"clients.dev + clients.unseen: got {count}, only {len(candidates)} clients of "
            "clients.held_out_from have test rows; lower the counts"
        )
    dev = _stratified(candidates, section.dev, section.split_seed, "dev")
    others = [c for c in candidates if c.id not in dev]
    unseen = _stratified(others, section.unseen, section.split_seed, "unseen")
    held_out = dev | unseen
    train = [c.id for c in clients if c.train_rows and c.id not in held_out]
    return Roles(train=tuple(sorted(train)), dev=tuple(sorted(dev)), unseen=tuple(sorted(unseen)))


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
