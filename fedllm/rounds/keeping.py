"""The small record of a round's clients, which stays when their updates are pruned."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from fedllm.planning.costs import adapter_weights, training_operations
from fedllm.storage.kept_records import ClientsRecord, TrainedClient, shortened
from fedllm.storage.records import CohortClient, CohortRecord, CollectionRecord, PreparedRecord
from fedllm.storage.updates import PublishedUpdate, Scan

_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class _TierSizes:
    """What the adapters of a tier take: weights, and operations of training per token."""

    rank: int
    weights: int
    operations: float


def clients_record(
    cohort: CohortRecord, prepared: PreparedRecord, scan: Scan, collection: CollectionRecord
) -> ClientsRecord:
    """Return the record of the clients that published an update, in the cohort's order."""
    used = {update.client for update in collection.updates}
    sizes = {tier: _sizes_of(ranks, prepared) for tier, ranks in cohort.ranks.items()}
    return ClientsRecord(
        round=cohort.round,
        clients=[
            _trained(
                client,
                scan.published[client.id],
                _sizes_of(client.ranks, prepared) if client.ranks else sizes[client.tier],
                used=client.id in used,
                left_out=collection.failed.get(client.id, ""),
            )
            for client in cohort.clients
            if client.id in scan.published
        ],
    )


def _sizes_of(ranks: Mapping[str, int], prepared: PreparedRecord) -> _TierSizes:
    weights = adapter_weights(ranks, prepared.modules)
    return _TierSizes(
        rank=max(ranks.values()),
        weights=weights,
        operations=training_operations(prepared.model_parameters, weights),
    )


def _trained(
    client: CohortClient,
    update: PublishedUpdate,
    sizes: _TierSizes,
    *,
    used: bool,
    left_out: str,
) -> TrainedClient:
    record = update.record
    losses, norms = record.losses, record.gradient_norms
    counted = bool(record.computed_tokens)
    # a worker of an earlier version did not record it
    received = record.received
    return TrainedClient(
        client=client.id,
        tier=client.tier,
        rank=sizes.rank,
        used=used,
        reason=record.reason or left_out,
        attempt=record.attempt,
        node=record.node,
        task=record.task,
        resumes=len(record.resumed_at),
        rows=record.rows,
        steps=record.steps,
        tokens=record.tokens,
        loss_tokens=record.loss_tokens,
        computed_tokens=record.computed_tokens,
        padded_tokens=record.padded_tokens,
        flops=record.computed_tokens * sizes.operations if counted else None,
        padded_flops=record.padded_tokens * sizes.operations if counted else None,
        seconds=round(record.seconds, 3),
        step_seconds=round(record.step_seconds, 3),
        peak_memory_bytes=record.peak_memory_bytes,
        energy_joules=record.energy_joules,
        bytes_up=update.num_bytes,
        bytes_down=received.num_bytes if received else _FLOAT32_BYTES * sizes.weights,
        values_up=sum(map(prod, update.shapes.values())),
        values_down=received.values if received else sizes.weights,
        trainable=received.trained_values if received else sizes.weights,
        loss=sum(losses) / len(losses) if losses else None,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        losses=shortened(losses),
        gradient_norm_mean=sum(norms) / len(norms) if norms else None,
        gradient_norm_max=max(norms, default=None),
    )
