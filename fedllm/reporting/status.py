"""Where a run stands, from its files alone."""

from dataclasses import dataclass

from fedllm.config.loading import read_config
from fedllm.storage.lease import HolderIsGone, highest, process_is_gone
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import (
    ClaimRecord,
    CohortRecord,
    PreparedRecord,
    RunRecord,
    SubmissionRecord,
    UpdateRecord,
)
from fedllm.storage.updates import DamagedUpdateError, read_records, update_files


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


def run_status(paths: RunPaths, gone: HolderIsGone = process_is_gone) -> RunStatus:
    """Read where a run stands; `gone` says whether its coordinator ended."""
    config = read_config(paths.config)
    record = RunRecord.read(paths.run)
    done = sum(paths.round(n).record.exists() for n in range(1, config.rounds + 1))
    current = _current(paths, config.rounds)
    prepared = PreparedRecord.find(paths.prepared)
    state, coordinator = _coordinator(paths, gone)
    return RunStatus(
        run_id=record.run_id,
        state="done" if current is None else state,
        coordinator=coordinator,
        rounds=config.rounds,
        rounds_done=done,
        prepared=prepared is not None,
        current=_round(paths.round(current), record) if prepared and current is not None else None,
    )


def _current(paths: RunPaths, rounds: int) -> int | None:
    """Return the last round that has begun: the next one trains while the last is evaluated."""
    open_ = [n for n in range(rounds + 1) if not paths.round(n).record.exists()]
    begun = [n for n in open_ if paths.round(n).root.exists()]
    return begun[-1] if begun else next(iter(open_), None)


def _coordinator(paths: RunPaths, gone: HolderIsGone) -> tuple[str, str]:
    number, holder = highest(paths)
    if holder is None or paths.released(number).exists():
        return "stopped", "none"
    where = f"host {holder.host}, pid {holder.pid}"
    if holder.slurm_job:
        where = f"Slurm job {holder.slurm_job}, {where}"
    return {True: "stopped", False: "running", None: "unknown"}[gone(holder)], where


def _round(paths: RoundPaths, run: RunRecord) -> RoundStatus:
    cohort = CohortRecord.find(paths.cohort)
    if cohort is None:
        return RoundStatus(round=paths.number, step="state" if not paths.number else "cohort")
    published = _published(paths, run)
    attempts = 0
    while paths.attempt(attempts + 1).submission.exists():
        attempts += 1
    claimed = _claimed(paths.attempt(attempts)) if attempts else set()
    failed = tuple(
        f"{client}: {record.reason}"
        for client, record in published.items()
        if record.status == "failed"
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


def _published(paths: RoundPaths, run: RunRecord) -> dict[str, UpdateRecord]:
    """Return the records of what is published, by the files' headers: no tensor is read."""
    found: dict[str, UpdateRecord] = {}
    for name in update_files(paths):
        try:
            records = read_records(paths.updates / name)
        except (DamagedUpdateError, OSError):
            continue
        for record in records:
            if (record.run_id, record.round) == (run.run_id, paths.number):
                found.setdefault(record.client, record)
    return found


def _claimed(attempt: AttemptPaths) -> set[str]:
    """Return the clients that tasks of an attempt have claimed."""
    bundles = SubmissionRecord.read(attempt.submission).bundles
    taken = {ClaimRecord.read(path).bundle for path in attempt.claim_files()}
    return {client for bundle in bundles if bundle.number in taken for client in bundle.clients}


def _step(paths: RoundPaths) -> str:
    if paths.aggregate_record.exists():
        return "evaluate"
    return "aggregate" if paths.collection.exists() else "train"
