"""Aggregate a whole model's updates from files, as a round does: time by stage and peak memory."""

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.inputs.adapters import kinds_of
from benchmarks.inputs.made_round import begin_round, update_of
from fedllm.config.loading import read_config, validate
from fedllm.config.models import Config
from fedllm.errors import UserError
from fedllm.planning.seeding import seed_of
from fedllm.server.aggregate import aggregate_round
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    CohortRecord,
    CollectedUpdate,
    CollectionRecord,
    ModuleRecord,
)
from fedllm.storage.tensors import publish_update
from fedllm.storage.updates import read_update

_POOL = 1 << 26  # floats, of which every factor is a piece
_COPIED_AT_ONCE = 64 << 20
_LOOK_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class WholeRound:
    """What the aggregation of a model's files took."""

    model: str
    device: str
    threads: int
    clients: int
    modules: int
    gib: float
    seconds: float
    stages: dict[str, float]
    copy_seconds: list[float]
    peak_anonymous_gib: float
    routes: dict[str, int]
    largest_excess: float

    def lines(self) -> list[str]:
        """Return it as lines."""
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.stages.items())
        copies = ", ".join(f"{seconds:.1f}" for seconds in self.copy_seconds)
        routes = ", ".join(f"{number} {route}" for route, number in self.routes.items())
        return [
            f"{self.model}: {self.modules} modules of {self.clients} clients, {self.gib:.2f} GiB "
            f"in files, {self.device}, {self.threads} threads",
            f"  aggregated in {self.seconds:.1f} s (stages overlap: {stages})",
            f"  copying the same files to the device through one buffer: {copies} s",
            f"  peak of anonymous memory: {self.peak_anonymous_gib:.2f} GiB",
            f"  routes: {routes}; excess at most {self.largest_excess:.1e}",
        ]


def whole_round(asked: argparse.Namespace) -> WholeRound:
    """Write a model's updates to a folder, unless they are there, and aggregate them.

    Raises:
        UserError: the folder holds something else.
    """
    folder: Path = asked.files.resolve()
    config = _config(asked)
    run = RunPaths(root=folder)
    if not run.config.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--files {folder}: not empty, and not a round of this program")
    if not run.round(1).collection.exists():
        _write(asked, run, config)
    if read_config(run.config) != config:
        raise UserError(f"--files {folder}: a round of other arguments; choose an empty folder")
    paths = run.round(1)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measured.whole_round", str(paths.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"the aggregation failed: {done.stderr.strip()}")
    record = AggregateRecord.read(paths.aggregate_record)
    files = sorted(paths.updates.rglob("*.safetensors"))
    routes = [module.route for module in record.modules.values()]
    return WholeRound(
        model=asked.shape,
        device=record.device,
        threads=asked.threads or torch.get_num_threads(),
        clients=record.clients,
        modules=len(record.modules),
        gib=sum(file.stat().st_size for file in files) / 2**30,
        seconds=record.seconds,
        stages=record.stages,
        copy_seconds=[_copied(files, torch.device(asked.device)) for _ in range(2)],
        peak_anonymous_gib=json.loads(done.stdout.splitlines()[-1]) / 2**30,
        routes={route: routes.count(route) for route in sorted(set(routes))},
        largest_excess=max(module.relative_excess for module in record.modules.values()),
    )


def _config(asked: argparse.Namespace) -> Config:
    kinds = {module.kind for module in _modules(asked.shape).values()}
    tiers = {
        f"type{number}": {
            "ranks": {kind: int(word[-1 if kind == "mlp" else 0]) for kind in sorted(kinds)}
        }
        for number, word in enumerate((w.split("+") for w in asked.ranks.split(",")), start=1)
    }
    return validate(
        {
            "model": {"path": asked.shape},
            "data": {"path": "none"},
            "clients": {
                "tiers": tiers,
                "cohort": {"count": asked.clients},
                "dev": 0,
                "unseen": 0,
            },
            "aggregation": {
                "device": asked.device,
                "threads": asked.threads or torch.get_num_threads(),
                "block_clients": asked.block_clients,
                "tolerance": asked.tolerance,
                "exact": asked.exact,
            },
            "method": {"name": getattr(asked, "method", "flexlora")},
        }
    )


def _write(asked: argparse.Namespace, run: RunPaths, config: Config) -> None:
    """Write round 0 and a collected round 1, a file for each client."""
    modules = _modules(asked.shape)
    cohort = begin_round(run, config, modules, [str(number) for number in range(asked.clients)])
    paths = run.round(1)
    updates = [_publish(paths, cohort, modules, place) for place in range(len(cohort.clients))]
    CollectionRecord(round=1, lease=1, updates=updates).publish(paths.collection)


def _modules(model: str) -> dict[str, ModuleRecord]:
    return {
        f"{number}.{kind.name.replace(',', '_')}": ModuleRecord(
            out_features=kind.shape.out,
            in_features=kind.shape.in_,
            kind="mlp" if kind.mlp else "attention",
        )
        for kind in kinds_of(model)
        for number in range(kind.number)
    }


def _publish(
    paths: RoundPaths, cohort: CohortRecord, modules: Mapping[str, ModuleRecord], place: int
) -> CollectedUpdate:
    client = cohort.clients[place]
    draws = torch.Generator().manual_seed(seed_of("benchmark", client.id))
    pool = torch.randn(_POOL, generator=draws)
    begins = count(step=7919 * 64)  # pieces overlap, no two are alike

    def piece(*shape: int) -> Tensor:
        size = math.prod(shape)
        begin = next(begins) % (_POOL - size)
        return pool[begin : begin + size].view(shape)

    ranks = cohort.ranks[client.tier]
    factors = {
        name: (piece(ranks[name], module.in_features), piece(module.out_features, ranks[name]))
        for name, module in modules.items()
    }
    path = paths.update(attempt=1, bundle=place, part=0)
    publish_update(path, [update_of(client, factors, rows=1, scale=2.0)], {client.id: factors})
    return CollectedUpdate(
        client=client.id,
        tier=client.tier,
        attempt=1,
        file=str(path.relative_to(paths.updates)),
        sha256=read_update(path)[0].sha256,
        weight=1.0,
    )


def _copied(files: Sequence[Path], device: torch.device) -> float:
    """Return the seconds of copying files to a device through one buffer, pinned for a GPU."""
    on_gpu = device.type == "cuda"
    buffer = torch.empty(_COPIED_AT_ONCE, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.empty_like(buffer, device=device)
    begun = time.perf_counter()
    for path in files:
        with path.open("rb") as file, memoryview(buffer.numpy().data) as content:
            while read := file.readinto(content):
                there[:read].copy_(buffer[:read])
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def main(argv: Sequence[str]) -> None:
    """Aggregate a round and print the peak of this process's anonymous memory, in bytes."""
    peak = [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], _anonymous_bytes())
            time.sleep(_LOOK_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
    aggregate_round(RoundPaths(root=Path(argv[0])))
    print(peak[0])


def _anonymous_bytes() -> int:
    """Return what the process holds that no file backs, shared (pinned) memory included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


if __name__ == "__main__":
    main(sys.argv[1:])
