"""Accounting of a run: bytes, operations, seconds and memory, by round, tier and client."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedllm.storage.kept_records import ClientCosts, ClientsRecord, TasksRecord
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import AggregateRecord, EvaluationRecord, RoundRecord

_BYTES_AT_16_BIT = 2
_STAGES = {"client": "training", "aggregate": "aggregation", "evaluate": "evaluation"}


@dataclass(frozen=True, kw_only=True)
class RoundAccount:
    """What a round took; of its clients those that published an update, used or not.

    Bytes are those of all clients, as stored and at 16 bit. Operations are None where an engine did
    not count its tokens. `server_seconds` are those of aggregation and evaluation,
    `allocated_seconds` those of the workers' tasks, idle ones too. `stages` has the seconds from
    the submission of the first task to the end of the last one, waiting included, for training,
    aggregation and evaluation, as far as they are done.
    """

    round: int
    clients: int
    bytes_up: int
    bytes_down: int
    bytes_up_16bit: int
    bytes_down_16bit: int
    flops: float | None
    padded_flops: float | None
    client_seconds: float
    server_seconds: float
    allocated_seconds: float
    gpu_seconds: float
    peak_memory_bytes: int
    stages: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TierAccount:
    """What the clients of a tier took in some rounds; means are over clients and rounds.

    `trainable` is the number of an adapter's weights, `trainable_share` its share of the base's.
    `peak_memory_bytes` is the largest of a process; `seconds`, `energy_joules` (None where devices
    do not tell it) and `bytes` are means.
    """

    tier: str
    rank: int
    clients: int
    trainable: int
    trainable_share: float
    bytes_up: float
    bytes_down: float
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    flops: float | None
    padded_flops: float | None
    first_loss: float | None
    last_loss: float | None
    energy_joules: float | None = None


def round_account(paths: RoundPaths) -> RoundAccount | None:
    """Return what a round took; None if its clients were not recorded, as in earlier versions."""
    record = ClientsRecord.find(paths.clients)
    if record is None:
        return None
    clients = record.clients
    aggregated = AggregateRecord.find(paths.aggregate_record)
    evaluated = EvaluationRecord.find(paths.evaluation_record)
    finished = RoundRecord.find(paths.record)
    return RoundAccount(
        round=paths.number,
        clients=len(clients),
        bytes_up=sum(client.bytes_up for client in clients),
        bytes_down=sum(client.bytes_down for client in clients),
        bytes_up_16bit=_BYTES_AT_16_BIT * sum(client.values_up for client in clients),
        bytes_down_16bit=_BYTES_AT_16_BIT * sum(client.values_down for client in clients),
        flops=_sum_of_known(client.flops for client in clients),
        padded_flops=_sum_of_known(client.padded_flops for client in clients),
        client_seconds=sum(client.seconds for client in clients),
        server_seconds=sum(each.seconds for each in (aggregated, evaluated) if each),
        allocated_seconds=finished.allocated_seconds if finished else 0.0,
        gpu_seconds=finished.gpu_seconds if finished else 0.0,
        peak_memory_bytes=max((client.peak_memory_bytes for client in clients), default=0),
        stages=stage_seconds(paths),
    )


def stage_seconds(paths: RoundPaths) -> dict[str, float]:
    """Return the seconds of a finished round's stages, waiting included; empty if unknown."""
    record = TasksRecord.find(paths.tasks)
    tasks = record.tasks if record else []
    return {
        stage: max(task.ended for task in same) - min(task.submitted for task in same)
        for kind, stage in _STAGES.items()
        if (same := [task for task in tasks if task.kind == kind])
    }


def round_accounts(paths: RunPaths, rounds: int) -> list[RoundAccount]:
    """Return what each of the first `rounds` rounds took, as far as it is recorded."""
    accounts = (round_account(paths.round(number)) for number in range(1, rounds + 1))
    return [account for account in accounts if account is not None]


def account_metrics(account: RoundAccount) -> dict[str, object]:
    """Return what a round took under the keys of `metrics.jsonl`."""
    return {
        name: getattr(account, name)
        for name in (
            *("bytes_up", "bytes_down", "bytes_up_16bit", "bytes_down_16bit"),
            *("flops", "padded_flops", "client_seconds", "server_seconds", "peak_memory_bytes"),
        )
    } | {f"{stage}_stage_seconds": seconds for stage, seconds in account.stages.items()}


def tier_accounts(clients: Iterable[ClientCosts], model_parameters: int) -> list[TierAccount]:
    """Return what the clients of each tier took in some rounds, the smallest rank first."""
    tiers: dict[str, list[ClientCosts]] = {}
    for client in clients:
        tiers.setdefault(client.tier, []).append(client)
    accounts = [_tier_account(tier, same, model_parameters) for tier, same in tiers.items()]
    return sorted(accounts, key=lambda account: (account.trainable, account.tier))


def _tier_account(tier: str, clients: Sequence[ClientCosts], model_parameters: int) -> TierAccount:
    seconds = sum(client.seconds for client in clients)
    trainable = max(client.trainable or client.values_down for client in clients)
    return TierAccount(
        tier=tier,
        rank=max(client.rank for client in clients),
        clients=len(clients),
        trainable=trainable,
        trainable_share=trainable / max(1, model_parameters),
        bytes_up=_mean(client.bytes_up for client in clients) or 0.0,
        bytes_down=_mean(client.bytes_down for client in clients) or 0.0,
        seconds=seconds / len(clients),
        tokens_per_second=sum(client.tokens for client in clients) / seconds if seconds else 0.0,
        peak_memory_bytes=max(client.peak_memory_bytes for client in clients),
        flops=_mean(client.flops for client in clients),
        padded_flops=_mean(client.padded_flops for client in clients),
        first_loss=_mean(client.first_loss for client in clients),
        last_loss=_mean(client.last_loss for client in clients),
        energy_joules=_mean(client.energy_joules for client in clients),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sum_of_known(values: Iterable[float | None]) -> float | None:
    """Return the sum; None if a value is unknown, as the sum of the others would mislead."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if listed and len(known) == len(listed) else None
