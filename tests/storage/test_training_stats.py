"""The numbers of a client's training: one definition for every record that carries them."""

import json

from fedllm.storage.checkpoint_header import CheckpointRecord
from fedllm.storage.records import TrainingStats, UpdateRecord, training_metrics
from tests.storage.samples import record_of


def test_an_update_carries_all_of_them() -> None:
    record = record_of("a", gradient_norms=[3.0, 1.0])
    stats = TrainingStats.of(record)
    assert (stats.steps, stats.rows, stats.losses) == (2, 7, [1.5, 1.25])
    assert UpdateRecord.model_validate_json(record.to_bytes()) == record
    assert dict(stats).items() <= dict(record).items()


def test_a_checkpoint_and_an_update_of_version_0_1_are_read() -> None:
    identity = {
        "run_id": "r",
        "result_fingerprint": "f",
        "round": 1,
        "client": "a",
        "base_fingerprint": "b",
        "data_fingerprint": "d",
        "state_sha256": "s",
    }
    old = {
        "identity": identity,
        "micro_batch_size": 4,
        "step": 2,
        "losses": [1.5, 1.25],
        "tokens": 20,
        "loss_tokens": 10,
        "seconds": 0.5,
        "step_seconds": 0.25,
        "peak_memory_bytes": 1,
        "resumed_at": [],
        "environments": [],
    }
    found = CheckpointRecord.model_validate_json(json.dumps(old))
    assert (found.steps, found.losses, found.gradient_norms) == (2, [1.5, 1.25], [])
    assert CheckpointRecord.model_validate_json(found.to_bytes()) == found
    update = json.loads(record_of("a").to_bytes())
    del update["gradient_norms"]
    assert UpdateRecord.model_validate(update) == record_of("a")


def test_a_client_counts_once_in_the_metrics_of_a_round() -> None:
    clients = [
        record_of("a", gradient_norms=[3.0, 1.0]),
        record_of("b", gradient_norms=[4.0]),
        record_of("c"),
    ]
    losses = {
        "training_loss": 1.375,
        "training_loss_first_step": 1.5,
        "training_loss_last_step": 1.25,
    }
    norms = {"gradient_norm_mean": 3.0, "gradient_norm_max": 4.0}
    assert training_metrics(clients) == losses | norms
    assert training_metrics(clients[2:]) == losses
    assert training_metrics([record_of("d", losses=[])]) == {}
