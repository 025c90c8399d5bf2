"""Evaluation targets: the clients and rows that are scored after a round."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedllm.config.models import Config, EvaluationSection
from fedllm.planning.roles import GROUPS, split_roles
from fedllm.planning.seeding import seed_of
from fedllm.planning.tiers import assign_tiers
from fedllm.storage.records import ClientRecord, Group, PreparedRecord

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Client to score; `rows` are indices into its test split."""

    client: str
    group: Group
    tier: str
    rows: tuple[int, ...]


def is_evaluated(section: EvaluationSection, round_number: int, rounds: int) -> bool:
    """Return whether a round is evaluated: round 0, every `evaluation.every`-th and the last."""
    if not section.every:
        return False
    return round_number % section.every == 0 or round_number == rounds


def is_complete(section: EvaluationSection, round_number: int, rounds: int) -> bool:
    """Return whether all clients and rows are scored: in the last round, and in round 0."""
    return section.complete_at_end and round_number in {0, rounds}


def choose_targets(config: Config, prepared: PreparedRecord, round_number: int) -> list[Target]:
    """Choose the targets of a round's evaluation.

    At most `evaluation.clients` of each group are scored, on at most `evaluation.rows_per_client`
    rows each. These subsets depend on `clients.split_seed` and are the same in every round.
    """
    section = config.evaluation
    complete = is_complete(section, round_number, config.rounds)
    by_id = {client.id: client for client in prepared.clients}
    tiers = assign_tiers(config.clients, config.seed, list(by_id))
    roles = split_roles(config.clients, prepared.clients)
    groups: Mapping[Group, tuple[str, ...]] = {name: getattr(roles, name) for name in GROUPS}
    seed = config.clients.split_seed
    targets: list[Target] = []
    for group, ids in groups.items():
        scored = [id_ for id_ in ids if by_id[id_].test_rows]
        limit = None if complete else section.clients
        for id_ in _subset(scored, limit, seed_of("evaluation", seed, group)):
            rows = _rows(by_id[id_], None if complete else section.rows_per_client, seed)
            targets.append(Target(client=id_, group=group, tier=tiers[id_], rows=rows))
    return targets


def _rows(client: ClientRecord, limit: int | None, seed: int) -> tuple[int, ...]:
    return tuple(_subset(range(client.test_rows), limit, seed_of("rows", seed, client.id)))


def _subset(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    if limit is None or limit >= len(items):
        return list(items)
    kept = random.Random(seed).sample(range(len(items)), limit)
    return [items[index] for index in sorted(kept)]
