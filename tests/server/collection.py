"""A collected round, made without training: random factors in real files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs.made_round import begin_round, update_of
from fedllm.config.loading import validate
from fedllm.lora.factors import Factors
from fedllm.planning.seeding import seed_of
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import (
    CohortClient,
    CohortRecord,
    CollectedUpdate,
    CollectionRecord,
    ModuleRecord,
    PreparedRecord,
    UpdateRecord,
)
from fedllm.storage.tensors import publish_update
from fedllm.storage.updates import read_update

RANKS = {"small": 2, "large": 5}
MODULES = {"a.q": (12, 12), "b.q": (12, 12), "a.up": (20, 12), "a.down": (12, 20)}


def make_round(
    root: Path,
    *,
    clients: int = 7,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    ranks: Mapping[str, int] = RANKS,
    dtype: torch.dtype = torch.float32,
    clients_per_file: int = 2,
    method: str = "flexlora",
    **aggregation: Any,
) -> RoundPaths:
    """Make a run with its state before training and a collected round 1."""
    run = RunPaths(root=root)
    config = validate(
        {
            "model": {"path": "nowhere"},
            "data": {"path": "nowhere"},
            "clients": {
                "tiers": {tier: {"ranks": rank} for tier, rank in ranks.items()},
                "cohort": {"count": clients},
                "dev": 0,
                "unseen": 0,
            },
            "method": {"name": method},
            "aggregation": {"block_clients": 2, "device": "cpu", **aggregation},
        }
    )
    sides = {
        name: ModuleRecord(out_features=out, in_features=in_, kind="other")
        for name, (out, in_) in modules.items()
    }
    cohort = begin_round(run, config, sides, [f"client/{n}" for n in range(clients)])
    paths = run.round(1)
    for number in range(0, clients, clients_per_file):
        chosen = cohort.clients[number : number + clients_per_file]
        factors = {
            client.id: _factors(client, modules, ranks[client.tier], dtype) for client in chosen
        }
        publish_update(
            paths.update(attempt=1, bundle=number // clients_per_file, part=0),
            [_record(client, factors[client.id]) for client in chosen],
            factors,
        )
    collect(paths)
    return paths


def collect(
    paths: RoundPaths,
    *,
    without: Sequence[int] = (),
    clipped: Mapping[int, Mapping[str, float]] | None = None,
) -> None:
    """Freeze the round's updates, except those of the cohort's places in `without`."""
    cohort = CohortRecord.read(paths.cohort)
    found = {
        update.record.client: update
        for file in sorted(paths.updates.glob("*.safetensors"))
        for update in read_update(file)
    }
    updates = [
        CollectedUpdate(
            client=client.id,
            tier=client.tier,
            attempt=1,
            file=found[client.id].file,
            sha256=found[client.id].sha256,
            weight=float(found[client.id].record.rows),
            clipped=dict((clipped or {}).get(place, {})),
        )
        for place, client in enumerate(cohort.clients)
        if place not in without
    ]
    CollectionRecord(round=1, lease=1, updates=updates).publish(paths.collection)


def sent(
    paths: RoundPaths, module: str, dtype: torch.dtype = torch.float32
) -> list[tuple[Factors, float]]:
    """Return each client's factors of a module, and its rows."""
    run = paths.run
    cohort = CohortRecord.read(paths.cohort)
    prepared = PreparedRecord.read(run.prepared)
    modules = {n: (m.out_features, m.in_features) for n, m in prepared.modules.items()}
    pairs = []
    for client in cohort.clients:
        rank = cohort.ranks[client.tier][module]
        trained = _factors(client, modules, rank, dtype)
        a, b = trained[module]
        record = _record(client, trained)
        factors = Factors(a_RI=a, b_OR=b, scale=record.scales[module])
        pairs.append((factors, float(record.rows)))
    return pairs


def _record(client: CohortClient, factors: Mapping[str, tuple[Tensor, Tensor]]) -> UpdateRecord:
    scale = 1.0 + 0.5 * len(client.tier)
    return update_of(client, factors, rows=seed_of(client.id) % 50 + 1, scale=scale)


def _factors(
    client: CohortClient, modules: Mapping[str, tuple[int, int]], rank: int, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, (out, in_) in modules.items():
        draw = torch.Generator().manual_seed(seed_of(client.id, name))
        a = torch.randn(rank, in_, generator=draw).to(dtype)
        found[name] = (a, torch.randn(out, rank, generator=draw).to(dtype))
    return found
