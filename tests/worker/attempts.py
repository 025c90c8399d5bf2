"""Attempts that tests plan, and the updates that workers published."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml

from fedllm.config.loading import read_config, result_fingerprint
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths, encode_client
from fedllm.storage.records import BundleRecord, RunRecord, SubmissionRecord, UpdateRecord
from fedllm.storage.tensors import TensorFile
from fedllm.storage.updates import read_update

ME = TaskIdentity(task="7_1", node="node-1", log="worker.log")
OTHER = TaskIdentity(task="7_2", node="node-2", log="other.log")

Update = dict[str, torch.Tensor]


def untrained(paths: RoundPaths) -> AttemptPaths:
    """Remove all that a round did after its plan; return its attempt."""
    attempt = paths.attempt(1)
    for folder in (paths.updates, paths.aggregate, attempt.claims, attempt.tasks):
        shutil.rmtree(folder, ignore_errors=True)
    for record in (paths.collection, paths.record, attempt.jobs, attempt.outcome):
        record.unlink(missing_ok=True)
    return attempt


def round_of(attempt: AttemptPaths) -> RoundPaths:
    return attempt.round


def files(attempt: AttemptPaths) -> list[str]:
    return sorted(path.name for path in round_of(attempt).updates.glob("*.safetensors"))


def updates(paths: RoundPaths) -> dict[str, tuple[UpdateRecord, Update]]:
    found: dict[str, tuple[UpdateRecord, Update]] = {}
    for path in sorted(paths.updates.glob("*.safetensors")):
        file = TensorFile(path)
        for published in read_update(path):
            encoded = encode_client(published.record.client)
            names = [f"{encoded}|{name}" for name in published.shapes]
            assert published.record.client not in found
            found[published.record.client] = (
                published.record,
                {name: file.get(name) for name in names},
            )
    return found


def assert_same_bits(paths: RoundPaths, done: Path, clients: Iterable[str] | None = None) -> None:
    found, expected = updates(paths), updates(RunPaths(root=done).round(1))
    assert set(found) == set(expected if clients is None else clients)
    for client, (record, tensors) in found.items():
        other, others = expected[client]
        assert record.losses == other.losses
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def plan(attempt: AttemptPaths, bundles: list[list[str]], worker_class: str = "small") -> None:
    submission = SubmissionRecord.read(attempt.submission)
    records = [
        BundleRecord(number=n, worker_class=worker_class, clients=clients, cost=float(n))
        for n, clients in enumerate(bundles)
    ]
    submission.model_copy(update={"bundles": records}).publish(attempt.submission)


def cohort(attempt: AttemptPaths) -> list[str]:
    submission = SubmissionRecord.read(attempt.submission)
    return [client for bundle in submission.bundles for client in bundle.clients]


def change_config(attempt: AttemptPaths, section: str, **keys: object) -> None:
    config = attempt.run.config
    raw = yaml.safe_load(config.read_text())
    raw[section] |= keys
    config.write_text(yaml.safe_dump(raw))
    # as if the run had been begun so
    begun = RunRecord.read(attempt.run.run)
    changed = {"result_fingerprint": result_fingerprint(read_config(config)), "config": {}}
    begun.model_copy(update=changed).publish(attempt.run.run)
