"""Pace of rounds, and an estimate of the end of the last one."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedllm.errors import counted
from fedllm.reporting.status.record_heads import CollectionHead
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.record_cache import RecordCache
from fedllm.storage.records import RoundRecord

RECENT_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class TierShare:
    """The clients of a tier that a round drew, and those whose updates it used."""

    drawn: int
    used: int


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The speed of a round: `seconds` from its draw to its state (or now), and training's share.

    A round that does not wait for all clients takes more of the fast `tiers`.
    """

    round: int
    clients: int
    tokens: float
    seconds: float
    training_seconds: float
    clients_per_minute: float
    tokens_per_second: float
    tiers: Mapping[str, TierShare] = field(default_factory=dict)
    tasks: int = 0
    gpu_hours: float = 0.0
    array_efficiency: float | None = None
    training_loss: float | None = None


def pace_of(
    *, round_number: int, clients: int, tokens: float, seconds: float, training_seconds: float
) -> Pace:
    """Return the speed of a round, without the numbers that its record adds."""
    return Pace(
        round=round_number,
        clients=clients,
        tokens=tokens,
        seconds=seconds,
        training_seconds=training_seconds,
        clients_per_minute=60.0 * clients / training_seconds if training_seconds else 0.0,
        tokens_per_second=tokens / training_seconds if training_seconds else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The seconds until the last round has its state, and the basis of this estimate (`how`)."""

    seconds: float
    how: str


def pace_of_round(records: RecordCache, paths: RoundPaths) -> Pace | None:
    """Return the speed of a round that has its state, or None if it is no longer known."""
    collection = records.find(CollectionHead, paths.collection)
    drawn, ended = written_at(paths.cohort), written_at(paths.aggregate_record)
    collected = written_at(paths.collection)
    if collection is None or drawn is None or ended is None or collected is None:
        return None
    pace = pace_of(
        round_number=paths.number,
        clients=len(collection.updates),
        tokens=sum(mix.tokens for mix in collection.tiers.values()),
        seconds=max(0.0, ended - drawn),
        training_seconds=max(0.0, collected - drawn),
    )
    mixes = collection.tiers.items()
    pace = replace(
        pace,
        tiers={t: TierShare(drawn=m.drawn, used=m.used) for t, m in mixes},
        training_loss=collection.training.get("training_loss"),
    )
    record = records.find(RoundRecord, paths.record)
    if record is None:
        return pace
    allocated = record.allocated_seconds
    return replace(
        pace,
        tasks=record.tasks,
        gpu_hours=record.gpu_seconds / 3600,
        array_efficiency=record.busy_seconds / allocated if allocated else None,
    )


def recent_paces(records: RecordCache, paths: RunPaths, newest: int) -> list[Pace]:
    """Return the speeds of the last rounds up to `newest` that have a state, oldest first."""
    first = max(1, newest - RECENT_ROUNDS + 1)
    paces = (pace_of_round(records, paths.round(n)) for n in range(first, newest + 1))
    return [pace for pace in paces if pace is not None]


def estimate(
    recent: Sequence[Pace], current: Pace | None, *, cohort: int, rounds_left: int
) -> Estimate | None:
    """Estimate when the last round has its state.

    Args:
        recent: rounds that have a state.
        current: the round in training, if any.
        cohort: the number of its clients.
        rounds_left: rounds without a state, including the current one.
    """
    timed = [pace.seconds for pace in recent if pace.seconds > 0]
    elapsed = current.seconds if current else 0.0
    if timed:
        round_seconds = statistics.median(timed)
        how = f"{counted(rounds_left, 'round')} at {round_seconds:.0f} s, the median so far"
        return Estimate(
            seconds=max(0.0, round_seconds - elapsed) + round_seconds * (rounds_left - 1), how=how
        )
    if current is None or not current.clients:
        return None
    round_seconds = elapsed * cohort / current.clients
    how = f"from {current.clients} of {cohort} clients in {elapsed:.0f} s of this first round"
    return Estimate(
        seconds=max(0.0, round_seconds - elapsed) + round_seconds * (rounds_left - 1), how=how
    )


def written_at(path: Path) -> float | None:
    """Return when a file was written, in seconds since the epoch by its file system's clock.

    This is only for people to read: no decision depends on it.
    """
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
