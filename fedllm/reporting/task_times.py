"""When the tasks of a round were submitted, started and ended, from their files."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedllm.errors import RunDirectoryError
from fedllm.storage.kept_records import PartRecord, TaskTimes
from fedllm.storage.paths import EvaluationPaths, JobPaths, RoundPaths, attempts_of
from fedllm.storage.records import AggregateRecord, TaskRecord


def task_times(paths: RoundPaths) -> list[TaskTimes]:
    """Return the times of a round's tasks, those of workers first; a damaged record has none."""
    workers: list[TaskTimes] = []
    for number, attempt in enumerate(attempts_of(paths.attempt), 1):
        for path in attempt.task_files():
            # times are for people: a record that a killed worker left must not end the run
            with contextlib.suppress(RunDirectoryError, FileNotFoundError):
                workers.append(_worker_times(attempt, number, path))
    return [*sorted(workers, key=lambda task: (task.started, task.task)), *_server_times(paths)]


def _worker_times(attempt: JobPaths, number: int, path: Path) -> TaskTimes:
    record, ended = TaskRecord.read(path), _written(path)
    started = ended - record.allocated_seconds
    return TaskTimes(
        kind="client",
        task=record.task,
        node=record.node,
        worker_class=record.worker_class,
        attempt=number,
        submitted=min(_submitted(attempt), started),
        started=started,
        ended=ended,
        clients=record.clients_done,
        busy_seconds=record.busy_seconds + record.earlier_busy_seconds,
        starts=record.starts,
    )


def _server_times(paths: RoundPaths) -> Iterator[TaskTimes]:
    aggregate = AggregateRecord.find(paths.aggregate_record)
    if aggregate:
        jobs = attempts_of(paths.aggregate_job)
        yield from _aggregation_times(jobs, paths.aggregate_record, aggregate.seconds)
    jobs = attempts_of(paths.evaluation_job)
    if jobs:
        yield from _scorer_times(paths.evaluation, jobs)


def _scorer_times(paths: EvaluationPaths, jobs: Sequence[JobPaths]) -> Iterator[TaskTimes]:
    """Yield the times of the tasks of an evaluation, from the parts that they published."""
    parts: dict[str, list[tuple[PartRecord, float]]] = {}
    for path in paths.part_files():
        part = PartRecord.glance(path)
        if part:
            parts.setdefault(part.task, []).append((part, _written(path)))
    for task, of_task in sorted(parts.items()):
        started = min(ended - part.seconds for part, ended in of_task)
        yield TaskTimes(
            kind="evaluate",
            task=task,
            node=of_task[0][0].node,
            attempt=len(jobs),
            submitted=min(_submitted(jobs[-1]), started),
            started=started,
            ended=max(ended for _, ended in of_task),
            busy_seconds=sum(part.seconds for part, _ in of_task),
        )


def _aggregation_times(
    jobs: Sequence[JobPaths], record: Path, seconds: float
) -> Iterator[TaskTimes]:
    """Yield the times of the aggregation whose last attempt wrote `record`; else nothing."""
    if not jobs:
        return
    ended = _written(record)
    yield TaskTimes(
        kind="aggregate",
        task="aggregate",
        attempt=len(jobs),
        submitted=min(_submitted(jobs[-1]), ended - seconds),
        started=ended - seconds,
        ended=ended,
        busy_seconds=seconds,
    )


def _submitted(job: JobPaths) -> float:
    """Return when a job's plan was written first; a wave that is added rewrites it."""
    return min(_written(path) for path in (job.submission, job.jobs) if path.exists())


def _written(path: Path) -> float:
    return path.stat().st_mtime
