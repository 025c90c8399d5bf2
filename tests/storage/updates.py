"""Update files to damage: two clients of a bundle, and the modules they trained."""

from pathlib import Path

import torch

from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.tensors import publish_update
from tests.storage.samples import RANKS, record_of

SIDES = {"layers.0.q_proj": (4, 6), "layers.0.up_proj": (5, 4)}
CLIENTS = ("task/7 ü", "12")
Tensors = dict[str, tuple[torch.Tensor, torch.Tensor]]


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
