"""Identity of a run: a directory that was copied or moved becomes a run of its own."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fedllm.storage.frozen_config import keep_run_record
from fedllm.storage.lease import Lease
from fedllm.storage.paths import JobPaths, RunPaths, attempts_of, backup_name
from fedllm.storage.records import ChangeRecord, RunRecord, SubmissionRecord
from fedllm.storage.trust.place import is_here, place_of


def new_run_id(fingerprint: str, root: Path) -> str:
    """Return an id that no other run has."""
    identity = f"{fingerprint}{root}{time.time_ns()}{os.getpid()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def keep_or_take_identity(
    paths: RunPaths, record: RunRecord, lease: Lease, say: Callable[[str], None]
) -> RunRecord:
    """Return the record of a run that lies where it began; in any other place, of a new run.

    A new run keeps all results and updates. Tasks in flight work in the directory that the record
    names: the plans here let go of them, so that nobody waits for them or cancels them.
    """
    place = place_of(paths.root)
    if is_here(record.place, paths.root):
        return record if record.place else record.model_copy(update={"place": place})
    assert record.place is not None
    lease.check()
    for path in (paths.coordinator_job, paths.coordinator_in_doubt):
        _set_aside(path)
    for job in _in_flight(paths):
        _let_go(job)
    run_id = new_run_id(record.result_fingerprint, paths.root)
    change = ChangeRecord(key="run_id", before=record.run_id, after=run_id, lease=lease.number)
    after = record.model_copy(
        update={
            "run_id": run_id,
            "earlier_ids": [*record.earlier_ids, record.run_id],
            "place": place,
            "changes": [*record.changes, change],
        }
    )
    keep_run_record(paths, after)
    say(
        f"{paths.root}: a copy of {record.place.path}, or moved from there: it goes on as run "
        f"{run_id} with all results of {record.run_id}; jobs of {record.run_id} are not touched"
    )
    return after


def _in_flight(paths: RunPaths) -> Iterator[JobPaths]:
    """Yield the plans of all steps that are not complete."""
    if not paths.prepared.exists():
        yield from attempts_of(paths.prepare_job)
    for each in paths.existing_rounds():
        if not each.collection.exists():
            yield from attempts_of(each.attempt)
        if not each.aggregate_record.exists():
            yield from attempts_of(each.aggregate_job)
        if not each.evaluation_record.exists():
            yield from attempts_of(each.evaluation_job)


def _let_go(job: JobPaths) -> None:
    for path in (job.jobs, job.in_doubt):
        _set_aside(path)
    plan = SubmissionRecord.read(job.submission)
    nobody: dict[str, object] = {"arrays": [], "workers": {}, "adopted": []}
    plan.model_copy(update=nobody).publish(job.submission)


def _set_aside(path: Path) -> None:
    if path.exists():
        path.rename(backup_name(path, "copied"))
