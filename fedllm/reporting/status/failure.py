"""The failure that ended a run: which step, why, in which log, and what helps."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.models import Config
from fedllm.errors import Incomplete, UserError
from fedllm.storage.kept_records import FailureRecord
from fedllm.storage.paths import JobPaths, RoundPaths, RunPaths, attempts_of
from fedllm.storage.records import ErrorRecord

# of a client's training: see `training.loop`
_DIVERGED = re.compile(r"is not finite|the loss of step \d+ is (?:nan|-?inf)")
_LOG = re.compile(r"[;(] ?(?:log|see) ([^\s;)]+)")
_LOWER_RATE = 0.3


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure: the step and round in which it happened, its message, its log, and a remedy."""

    step: str
    round: int
    message: str
    log: str
    remedy: str
    exit_code: int


def failure_of(
    paths: RunPaths, config: Config, lease: int, rounds: list[RoundPaths]
) -> Failure | None:
    """Return what ended a run that no coordinator works on, or None if nothing did.

    Args:
        paths: the run.
        config: its configuration.
        lease: the number of its last lease; a later coordinator may have solved earlier problems.
        rounds: its unfinished rounds.
    """
    record = FailureRecord.find(paths.failure(lease)) if lease else None
    record = record or _of_job(paths, lease, rounds)
    if record is None:
        return None
    found = _LOG.search(record.message)
    return Failure(
        step=record.step,
        round=record.round,
        message=record.message,
        log=found[1] if found else _newest_log(paths, record.round),
        remedy=_remedy(paths.root, config, record),
        exit_code=record.exit_code,
    )


def _of_job(paths: RunPaths, lease: int, rounds: list[RoundPaths]) -> FailureRecord | None:
    """Return the error of the last job whose step is not complete.

    A coordinator that was killed, or is of an earlier version, recorded none itself.
    """
    for step, number, jobs in _open_jobs(paths, rounds):
        error = ErrorRecord.find(jobs[-1].error) if jobs else None
        if error:
            log = f"; log {error.log}" if error.log else ""
            return FailureRecord(
                lease=lease,
                round=number,
                step=step,
                kind=error.kind,
                message=f"{error.message}{log}",
                exit_code=error.exit_code,
            )
    return None


def _open_jobs(
    paths: RunPaths, rounds: list[RoundPaths]
) -> Iterator[tuple[str, int, list[JobPaths]]]:
    """Yield the steps of one job that are not complete: step, round, attempts."""
    if not paths.prepared.exists():
        yield "prepare", 0, attempts_of(paths.prepare_job)
    for each in rounds:
        if not each.aggregate_record.exists():
            yield "aggregate", each.number, attempts_of(each.aggregate_job)
        elif not each.evaluation_record.exists():
            yield "evaluate", each.number, attempts_of(each.evaluation_job)


def _newest_log(paths: RunPaths, number: int) -> str:
    folder = paths.logs(number)
    logs = [path for path in folder.rglob("*") if path.suffix in {".log", ".out"}]
    return str(max(logs, key=lambda path: path.stat().st_mtime)) if logs else ""


def _remedy(root: Path, config: Config, record: FailureRecord) -> str:
    resume = f"fedllm resume {shlex.quote(str(root))}"
    if _DIVERGED.search(record.message):
        rate = config.training.learning_rate
        lower = float(f"{rate * _LOWER_RATE:.1g}")
        return (
            f"training diverged: training.learning_rate {rate:g} is too high for these clients; it "
            "is frozen with the first round, so begin a new run with a smaller one: --run-dir NEW "
            f"--set training.learning_rate={lower:g}"
        )
    if record.exit_code == UserError.exit_code:
        return f"change what the message names, then: {resume}"
    if record.exit_code == Incomplete.exit_code:
        return f"nothing is lost; go on with: {resume}"
    return f"look into the log; {resume} tries the step again"
