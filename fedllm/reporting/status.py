"""Where a run stands, from its files alone."""

from dataclasses import dataclass

from fedllm.config.loading import read_config
from fedllm.storage.lease import highest, process_is_gone
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import (
    ClaimRecord,
    CohortRecord,
    PreparedRecord,
    RunRecord,
    SubmissionRecord,
)
from fedllm.storage.updates import UpdateScanner


@dataclass(frozen=True, kw_only=True)
class RoundStatus:
    """One round that has begun."""

    round: int
    step: str
    cohort: int = 0
    published: int = 0
    claimed: int = 0
    failed: tuple[str, ...] = ()
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run: `state` is done, running, stopped or unknown (a coordinator on another machine)."""

    run_id: str
    state: str
    coordinator: str
    rounds: int
    rounds_done: int
    prepared: bool
    current: RoundStatus | None


def run_status(paths: RunPaths) -> RunStatus:
    """Read where a run stands."""
    config = read_config(paths.config)
    record = RunRecord.read(paths.run)
    done = sum(paths.round(n).record.exists() for n in range(1, config.rounds + 1))
    current = next(
        (n for n in range(config.rounds + 1) if not paths.round(n).record.exists()), None
    )
    prepared = PreparedRecord.find(paths.prepared)
    state, coordinator = _coordinator(paths)
    return RunStatus(
        run_id=record.run_id,
        state="done" if current is None else state,
        coordinator=coordinator,
        rounds=config.rounds,
        rounds_done=done,
        prepared=prepared is not None,
        current=_round(paths.round(current), record) if prepared and current is not None else None,
    )


def _coordinator(paths: RunPaths) -> tuple[str, str]:
    number, holder = highest(paths)
    if holder is None or paths.released(number).exists():
        return "stopped", "none"
    where = f"host {holder.host}, pid {holder.pid}"
    if holder.slurm_job:
        return "unknown", f"Slurm job {holder.slurm_job}, {where}"
    gone = process_is_gone(holder)
    return {True: "stopped", False: "running", None: "unknown"}[gone], where


def _round(paths: RoundPaths, run: RunRecord) -> RoundStatus:
    cohort = CohortRecord.find(paths.cohort)
    if cohort is None:
        return RoundStatus(round=paths.number, step="state" if not paths.number else "cohort")
    scanner = UpdateScanner(
        round=paths, run_id=run.run_id, base_fingerprint=cohort.base_fingerprint
    )
    published = scanner.scan().published
    attempts = 0
    claimed: set[str] = set()
    while (attempt := paths.attempt(attempts + 1)).submission.exists():
        attempts += 1
        bundles = SubmissionRecord.read(attempt.submission).bundles
        taken = {ClaimRecord.read(p).bundle for p in attempt.claims.glob("*.json")}
        claimed |= {c for b in bundles if b.number in taken for c in b.clients}
    failed = tuple(
        f"{update.record.client}: {update.record.reason}"
        for update in published.values()
        if update.record.status == "failed"
    )
    return RoundStatus(
        round=paths.number,
        step=_step(paths),
        cohort=len(cohort.clients),
        published=len(published),
        claimed=len(claimed - set(published)),
        failed=failed,
        attempts=attempts,
    )


def _step(paths: RoundPaths) -> str:
    if paths.aggregate_record.exists():
        return "evaluate"
    return "aggregate" if paths.collection.exists() else "train"
