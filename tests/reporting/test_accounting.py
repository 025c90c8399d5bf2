"""What a run took: clients, bytes, operations and seconds, from what retention keeps."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fedllm.errors import UserError
from fedllm.reporting.results.accounting import round_account, round_accounts, tier_accounts
from fedllm.reporting.results.cost_to_target import ScoreTarget, cost_to_target, target_of
from fedllm.reporting.status.status import run_status
from fedllm.storage.kept_records import ClientCosts, ClientsRecord, TasksRecord, shortened
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord
from fedllm.storage.updates import read_update, update_files


@pytest.fixture
def run(finished: Path) -> RunPaths:
    return RunPaths(root=finished)


def test_numbers_of_every_client_stay_when_its_update_is_pruned(run: RunPaths) -> None:
    assert not run.round(1).updates.exists()
    for number in (1, 2):
        cohort = CohortRecord.read(run.round(number).cohort)
        clients = ClientsRecord.read(run.round(number).clients).clients
        assert [client.client for client in clients] == [client.id for client in cohort.clients]
        assert all(client.used and len(client.losses) == client.steps == 3 for client in clients)
        assert {client.tier: client.rank for client in clients} == {"small": 2, "large": 8}
        assert all(client.peak_memory_bytes and client.seconds for client in clients)
        # rows share a prompt, which is computed once; the plain loop pads
        assert all(c.computed_tokens < c.padded_tokens for c in clients)
        assert all((c.flops or 0) < (c.padded_flops or 0) for c in clients)


def test_numbers_are_those_of_the_update(run: RunPaths) -> None:
    paths = run.round(2)
    sent = {
        update.record.client: update
        for name in update_files(paths)
        for update in read_update(paths.updates / name)
    }
    for client in ClientsRecord.read(paths.clients).clients:
        update = sent[client.client]
        assert client.losses == pytest.approx(update.record.losses, rel=1e-5)
        assert client.last_loss == update.record.losses[-1]
        # float32 both ways
        assert client.bytes_up == client.bytes_down == 4 * client.values_up == update.num_bytes
        assert client.values_up == client.values_down == client.trainable


def test_metrics_have_the_training_loss_and_what_the_round_took(run: RunPaths) -> None:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    clients = ClientsRecord.read(run.round(2).clients).clients
    losses = [client.loss for client in clients if client.loss is not None]
    assert rows[2]["training_loss"] == pytest.approx(sum(losses) / len(losses))
    assert rows[2]["bytes_up"] == 2 * rows[2]["bytes_up_16bit"]
    assert rows[2]["bytes_up"] == sum(client.bytes_up for client in clients)
    assert 0 < rows[2]["flops"] < rows[2]["padded_flops"]
    assert rows[2]["server_seconds"] >= rows[2]["aggregate_seconds"]
    assert rows[2]["aggregation_stage_seconds"] >= rows[2]["aggregate_seconds"] > 0
    assert rows[2]["training_stage_seconds"] > 0 < rows[2]["evaluation_stage_seconds"]
    assert "training_loss" not in rows[0]
    assert "bytes_up" not in rows[0]


def test_tiers_have_their_share_of_the_base(run: RunPaths) -> None:
    prepared = PreparedRecord.read(run.prepared)
    records = [ClientsRecord.read(run.round(number).clients) for number in (1, 2)]
    clients = [client for record in records for client in record.clients]
    small, large = tier_accounts(clients, prepared.model_parameters)
    assert (small.tier, small.rank, large.tier, large.rank) == ("small", 2, "large", 8)
    assert small.clients + large.clients == 8
    assert small.trainable_share == small.trainable / prepared.model_parameters
    assert small.bytes_up < large.bytes_up


def test_a_status_reads_only_the_heads_of_records_that_list_clients(
    run: RunPaths, tmp_path: Path
) -> None:
    paths = RunPaths(root=Path(shutil.copytree(run.root, tmp_path / "run")))
    before = run_status(paths)
    for file, listed in (
        (paths.prepared, "clients"),
        (paths.round(2).collection, "updates"),
        (paths.round(2).clients, "clients"),
    ):
        content, times = json.loads(file.read_bytes()), file.stat()
        costs = {*ClientCosts.model_fields, "id", "category"}
        content[listed] = [{k: v for k, v in c.items() if k in costs} for c in content[listed]]
        file.write_text(json.dumps(content))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = run_status(paths)
    assert after.training and after.recent and after.history.training_losses
    assert (after.training, after.recent, after.history) == (
        *(before.training, before.recent, before.history),
    )


def test_times_of_tasks_stay_too(run: RunPaths) -> None:
    tasks = TasksRecord.read(run.round(2).tasks).tasks
    assert {task.kind for task in tasks} == {"client", "aggregate", "evaluate"}
    assert all(task.submitted <= task.started <= task.ended for task in tasks)
    assert sum(task.clients for task in tasks) == 4


def test_the_cost_of_a_target_counts_the_rounds_until_it_was_reached(run: RunPaths) -> None:
    start = cost_to_target(run, 2, target_of("loss=99"))
    assert start is not None
    assert (start.round, start.num_bytes) == (0, 0)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    target = rows[2]["dev_loss"]
    assert target < rows[1]["dev_loss"]
    cost = cost_to_target(run, 2, ScoreTarget(metric="loss", value=target, group="dev"))
    assert cost is not None
    accounts = round_accounts(run, 2)
    assert (cost.round, cost.value) == (2, target)
    assert cost.num_bytes == sum(a.bytes_up + a.bytes_down for a in accounts)
    assert cost_to_target(run, 2, target_of("exact_match=1.1")) is None
    assert target_of("unseen.rouge_l=0.5") == ScoreTarget(
        metric="rouge_l", value=0.5, group="unseen"
    )
    for wrong in ("loss", "loss=nan", "nobody.loss=1", "los=1"):
        with pytest.raises(UserError, match="need METRIC=NUMBER"):
            target_of(wrong)


def test_a_round_of_an_earlier_version_has_no_account(tmp_path: Path) -> None:
    assert round_account(RunPaths(root=tmp_path).round(1)) is None


def test_long_lists_of_losses_are_shortened_to_means_of_spans() -> None:
    assert shortened([]) == ()
    assert shortened([1.0, 2.0]) == (1.0, 2.0)
    assert shortened([1.0, 3.0, 5.0, 7.0], 2) == (2.0, 6.0)
    assert len(shortened([0.5] * 1000)) == 32
