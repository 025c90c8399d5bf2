"""Progress of the jobs that run now, from the records that they write."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedllm.storage.kept_records import ProgressRecord
from fedllm.storage.paths import JobPaths, RoundPaths, RunPaths, attempts_of
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
    record = records.find(ProgressRecord, attempts[-1].progress) if attempts else None
    if record is None:
        return []
    return [JobProgress(step=step, round=number, **record.model_dump())]
