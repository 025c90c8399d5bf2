"""Configurations of the paper and of the evidence: planned at full size, run with two clients."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.config.loading import load_changed, load_config
from fedllm.config.models import Config
from fedllm.config.sweep_files import is_sweep_file, load_sweep
from fedllm.planning.federation import plan_federation
from fedllm.planning.sweeps.sweep_runs import expand
from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.records import CollectionRecord, EvaluationRecord
from tests.cli.commands import in_process
from tests.planning.federations import client, prepared_of
from tests.tiny import Tiny

FOLDERS = [shipped("configs") / name for name in ("paper", "evidence")]
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))
PATHS = {"model.path": "base", "data.path": "rows"}
# what a base of hidden size 32 needs, and how little a test may take
TWO_CLIENTS = {
    **{"clients.ranks_above_module": "cap", "data.cutoff_tokens": 96, "rounds": 1},
    **{"clients.cohort": {"count": 2}, "clients.dev": 1, "clients.unseen": 1},
    "training.max_steps": 1,
    "evaluation": {"clients": 1, "rows_per_client": 1, "complete_at_end": False},
    "evaluation.max_new_tokens": 2,
    "scheduler.kind": "inline",
}


def configurations(path: Path) -> Iterator[Config]:
    """Yield a configuration, or all of a sweep."""
    if not is_sweep_file(path):
        yield load_config(path, [f"{key}={value}" for key, value in PATHS.items()])
        return
    file = load_sweep(path)
    for run in expand(file, lambda changes: load_changed(file.base, {**changes, **PATHS})):
        yield run.config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_fits_the_clients_it_is_for(path: Path) -> None:
    count = 1613 if path.parent.name == "paper" else 112
    clients = [client(str(number), category=f"kind {number % 8}") for number in range(count)]
    for config in configurations(path):
        capped = config.clients.model_copy(update={"ranks_above_module": "cap"})
        federation = plan_federation(
            config.model_copy(update={"clients": capped}), prepared_of(clients)
        )
        assert federation.cohort(1)


@pytest.mark.parametrize("name", ["paper/paper", "evidence/nano"])
def test_it_runs_with_two_clients(name: str, tiny: Tiny, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(80):
            row = {"client_id": number // 4, "category": f"kind {number % 3}"}
            row |= {"instruction": "Add one.", "input": str(number), "output": str(number + 1)}
            file.write(json.dumps(row) + "\n")
    keys = {**TWO_CLIENTS, "data.path": str(rows), "model.path": str(tiny.model)}
    keys["storage.cache"] = str(tiny.cache)
    changes = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    run = in_process(
        *("run", shipped(f"configs/{name}.yaml"), "--run-dir", tmp_path / "run"),
        *(word for change in changes for word in ("--set", change)),
    )
    assert run.returncode == 0, run.stderr
    paths = RunPaths(root=tmp_path / "run")
    assert len(CollectionRecord.read(paths.round(1).collection).updates) == 2
    scored = EvaluationRecord.read(paths.round(1).evaluation_record).clients
    assert {client.group for client in scored} == {"train", "dev", "unseen"}
