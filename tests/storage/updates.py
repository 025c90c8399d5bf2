"""Update files to damage: two clients of a bundle, and the modules they trained."""

from pathlib import Path

import torch

from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import UpdateRecord
from fedllm.storage.tensors import publish_update

RANKS = {"layers.0.q_proj": 2, "layers.0.up_proj": 3}
SIDES = {"layers.0.q_proj": (4, 6), "layers.0.up_proj": (5, 4)}
CLIENTS = ("task/7 ü", "12")
Tensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def record_of(client: str, **changes: object) -> UpdateRecord:
    record = UpdateRecord(
        run_id="run",
        round=3,
        client=client,
        attempt=1,
        bundle=0,
        base_fingerprint="base",
        rows=7,
        steps=2,
        tokens=20,
        loss_tokens=10,
        losses=[1.5, 1.25],
        seconds=0.5,
        step_seconds=0.25,
        peak_memory_bytes=1,
        norms=dict.fromkeys(RANKS, (1.0, 2.0)),
        scales=dict.fromkeys(RANKS, 2.0),
    )
    return UpdateRecord.model_validate({**record.model_dump(), **changes})


def tensors_of(client: str, ranks: dict[str, int] = RANKS) -> Tensors:
    draw = torch.Generator().manual_seed(len(client))
    return {
        module: (
            torch.randn(rank, SIDES[module][1], generator=draw),
            torch.randn(SIDES[module][0], rank, generator=draw),
        )
        for module, rank in ranks.items()
    }


def round_in(folder: Path) -> RoundPaths:
    return RunPaths(root=folder).round(3)


def publish(
    paths: RoundPaths, *clients: str, attempt: int = 1, bundle: int = 0, **changes: object
) -> Path:
    path = paths.update(attempt=attempt, bundle=bundle, part=0)
    records = [record_of(client, attempt=attempt, bundle=bundle, **changes) for client in clients]
    publish_update(path, records, {client: tensors_of(client) for client in clients})
    return path
