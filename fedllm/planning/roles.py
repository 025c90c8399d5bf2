"""Who trains and who is only scored: dev and unseen clients never train."""

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
    """Client ids by role, each in canonical (sorted) order; clients without any use are in none."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    unseen: tuple[str, ...]


def split_roles(section: ClientsSection, clients: Sequence[ClientRecord]) -> Roles:
    """Draw dev and unseen clients from the candidates, stratified by category.

    A client without training rows never trains and may be unseen or dev; one without test rows
    is neither.

    Raises:
        ConfigError: there are fewer candidates than asked for.
    """
    candidates = [c for c in clients if c.held_out_candidate and c.test_rows]
    wanted = section.dev + section.unseen
    if wanted > len(candidates):
        raise ConfigError(
            f"clients.dev + clients.unseen: got {wanted}, only {len(candidates)} clients of "
            "clients.held_out_from have test rows; lower the counts"
        )
    dev = _stratified(candidates, section.dev, section.split_seed, "dev")
    left = [c for c in candidates if c.id not in dev]
    unseen = _stratified(left, section.unseen, section.split_seed, "unseen")
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
