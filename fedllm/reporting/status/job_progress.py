"""Progress of the jobs that run now, from the records that they write."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fedllm.storage.kept_records import ProgressRecord
from fedllm.storage.paths import JobPaths, PackedJobPaths, RoundPaths, RunPaths, attempts_of
from fedllm.storage.record_cache import RecordCache


@dataclass(frozen=True, kw_only=True)
class JobProgress:
    """How far a job is: its step and round, and what it counts, as in `ProgressRecord`."""

    step: str
    round: int
    what: str
    done: int
    total: int
    seconds: float

    @property
    def text(self) -> str:
        """The progress in words."""
        record = ProgressRecord(
            what=self.what, done=self.done, total=self.total, seconds=self.seconds
        )
        return record.text


def job_progress(
    records: RecordCache, paths: RunPaths, rounds: Iterable[RoundPaths]
) -> list[JobProgress]:
    """Return how far the jobs of a run's open steps are, those of its unfinished `rounds`."""
    if not paths.prepared.exists():
        return _of_step(records, "prepare", 0, paths.prepare_job)
    found: list[JobProgress] = []
    for each in rounds:
        if not each.aggregate_record.exists():
            found += _of_step(records, "aggregate", each.number, each.aggregate_job)
        elif not each.evaluation_record.exists():
            found += _of_step(records, "evaluate", each.number, each.evaluation_job)
    return found


def _of_step(
    records: RecordCache, step: str, number: int, folder: Callable[[int], JobPaths]
) -> list[JobProgress]:
    attempts = attempts_of(folder)
    files = _progress_files(attempts[-1]) if attempts else []
    found = records.all(ProgressRecord, files)
    if not found:
        return []
    # each task counts what it has done itself, of all that there is to do
    together = found[0].model_copy(
        update={
            "done": sum(record.done for record in found),
            "seconds": max(record.seconds for record in found),
        }
    )
    return [JobProgress(step=step, round=number, **together.model_dump())]


def _progress_files(job: JobPaths) -> list[Path]:
    return job.progress_files() if isinstance(job, PackedJobPaths) else [job.progress]
