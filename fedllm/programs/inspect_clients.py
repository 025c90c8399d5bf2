"""Inspection of all clients: rows, categories, lengths, roles and tiers, before anything trains."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fedllm.config.models import Config
from fedllm.data.readers import open_source
from fedllm.errors import counted
from fedllm.planning.federation import plan_federation
from fedllm.planning.roles import GROUPS
from fedllm.programs.prepare import prepare
from fedllm.reporting.tables import number, text_table
from fedllm.storage.kept_records import Count, uncounted
from fedllm.storage.paths import CachePaths

_MOST_SHOWN = 60
_BAR = 24


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """A client: its role and tier, rows by split, lengths in tokens, and rows by category.

    `distance` is the total variation distance between its categories and those of all rows: 0 if
    it has the same mixture, near 1 if it shares hardly any row with the others.
    """

    client: str
    role: str
    tier: str
    train_rows: int
    test_rows: int
    mean_tokens: float
    longest_row: int
    categories: dict[str, int]
    distance: float


@dataclass(frozen=True, kw_only=True)
class ClientsInspection:
    """All clients of a configuration, and where they come from."""

    kind: str
    clients: tuple[ClientView, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return dataclasses.asdict(self)


def inspect_clients(
    config: Config, cache: CachePaths, count: Count = uncounted
) -> ClientsInspection:
    """Return the clients of a configuration, as prepare finds them.

    Raises:
        FedllmError: model, data and configuration do not fit together.
    """
    prepared = prepare(config, cache, count=count)
    federation = plan_federation(config, prepared)
    tables = open_source(config.data, cache, config.clients.split_seed).read()
    categories = _categories_of(tables)
    total = sum(categories.values(), Counter[str]())
    roles = {client: role for role in GROUPS for client in getattr(federation.roles, role)}
    return ClientsInspection(
        kind=config.data.partition.kind,
        clients=tuple(
            ClientView(
                client=client.id,
                role=roles.get(client.id, "no rows"),
                tier=federation.tiers[client.id],
                train_rows=client.train_rows,
                test_rows=client.test_rows,
                mean_tokens=client.train_tokens / max(1, client.train_rows),
                longest_row=client.longest_row,
                categories=dict(categories[client.id].most_common()),
                distance=_distance(categories[client.id], total),
            )
            for client in prepared.clients
        ),
    )


def _categories_of(tables: Mapping[str, pa.Table]) -> dict[str, Counter[str]]:
    """Return client -> category -> rows of all splits."""
    found: dict[str, Counter[str]] = {}
    for table in tables.values():
        counts = table.group_by(["client", "category"]).aggregate([([], "count_all")])
        for row in counts.to_pylist():
            found.setdefault(row["client"], Counter())[row["category"]] += row["count_all"]
    return found


def _distance(own: Counter[str], total: Counter[str]) -> float:
    rows, all_rows = own.total(), total.total()
    return sum(abs(own[c] / rows - total[c] / all_rows) for c in total) / 2


def describe_clients(partition: ClientsInspection) -> str:
    """Return the clients as text: quantiles of all, and a row for each of the first ones."""
    clients = partition.clients
    shown = clients[:_MOST_SHOWN]
    parts = [
        f"{counted(len(clients), 'client')} (data.partition.kind {partition.kind}): "
        + _counts(clients),
        _quantiles(clients),
        _rows(shown, max(client.train_rows for client in clients)),
    ]
    if len(clients) > len(shown):
        parts.append(f"and {len(clients) - len(shown):,} more; --json has all")
    return "\n\n".join(parts)


def _counts(clients: Sequence[ClientView]) -> str:
    roles = Counter(client.role for client in clients)
    tiers = Counter(client.tier for client in clients)
    return "; ".join(
        ", ".join(f"{count} {name}" for name, count in counts.items()) for counts in (roles, tiers)
    )


def _quantiles(clients: Sequence[ClientView]) -> str:
    columns: dict[str, list[float]] = {
        "training rows": [float(client.train_rows) for client in clients],
        "test rows": [float(client.test_rows) for client in clients],
        "tokens of a row, mean": [client.mean_tokens for client in clients],
        "categories": [float(len(client.categories)) for client in clients],
        "distance from all rows": [client.distance for client in clients],
    }
    rows = []
    for name, values in columns.items():
        ordered = sorted(values)
        middle = statistics.median(ordered)
        digits = 2 if name.startswith("distance") else 0
        rows.append([name, *(number(v, digits) for v in (ordered[0], middle, ordered[-1]))])
    return text_table("over clients", ["", "least", "median", "most"], rows)


def _rows(clients: Sequence[ClientView], most: int) -> str:
    rows = [
        [
            client.client,
            client.role,
            client.tier,
            str(client.train_rows),
            str(client.test_rows),
            number(client.mean_tokens, 0),
            str(client.longest_row),
            number(client.distance, 2),
            f"{'#' * round(_BAR * client.train_rows / max(1, most)):.<{_BAR}}",
            _top(client.categories),
        ]
        for client in clients
    ]
    header = ["client", "role", "tier", "train", "test", "tokens", "longest", "distance"]
    return text_table("clients", [*header, "training rows", "categories"], rows)


def _top(categories: Mapping[str, int]) -> str:
    names = [f"{name or '(none)'} {count}" for name, count in list(categories.items())[:3]]
    more = len(categories) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
