"""Attempts that tests plan, and the updates that workers published."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml

from fedllm.config.loading import dump_config, validate
from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.frozen_config import new_run_record
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths, encode_client
from fedllm.storage.records import BundleRecord, RunRecord, SubmissionRecord, UpdateRecord
from fedllm.storage.tensors import TensorFile
from fedllm.storage.updates import read_update
from fedllm.worker.task import WorkerTask

ME = TaskIdentity(task="7_1", node="node-1", log="worker.log")
OTHER = TaskIdentity(task="7_2", node="node-2", log="other.log")

Update = dict[str, torch.Tensor]


def alone(session: Session, attempt: AttemptPaths) -> WorkerTask:
    """A task of this process alone."""
    return WorkerTask(
        identity=ME, attempt=attempt, worker_class=None, session=session, signals=StopSignals()
    )


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
    change_sections(attempt.run, {section: keys})


def change_sections(run: RunPaths, changes: Mapping[str, Mapping[str, object]]) -> None:
    """Make a run one that was begun with other keys."""
    raw = yaml.safe_load(run.config.read_text())
    for section, keys in changes.items():
        raw[section] |= keys
    config = validate(raw)
    run.config.write_text(dump_config(config))
    known = RunRecord.read(run.run)
    new_run_record(config, run_id=known.run_id, versions=known.versions).publish(run.run)
