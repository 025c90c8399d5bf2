"""Tasks in flight: what the next step of a run waits for."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedllm.config.models import Config
from fedllm.rounds.dispatch.idle_workers import busy_tasks
from fedllm.rounds.dispatch.submissions import active_tasks, known_tasks, unsent_arrays
from fedllm.rounds.run import Run
from fedllm.storage.paths import AttemptPaths, JobPaths, RoundPaths, RunPaths, attempts_of
from fedllm.storage.publishing.publish import age_seconds
from fedllm.storage.records import CohortRecord, JobsRecord, SubmissionRecord

# how often to look whether enough updates came while workers are still busy
_LOOK_AGAIN_MINUTES = 5


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """The tasks that the next step of a run waits for.

    Attributes:
        tasks: ids of the tasks that work on it.
        waits_for_room: whether tasks could not be submitted because of a limit on submitted jobs.
        look_again_minutes: minutes after which there may be more to do although tasks still run;
            None: there is nothing to do before they end.
    """

    tasks: tuple[str, ...]
    waits_for_room: bool = False
    look_again_minutes: int | None = None


def find_in_flight(run: Run) -> InFlight:
    """Return the tasks in flight; those of evaluations only if no other step has any."""
    return (
        _in_flight(run, _unfinished_steps(run))
        or _in_flight(run, _unfinished_evaluations(run))
        or InFlight(tasks=())
    )


def is_done(paths: RunPaths, config: Config) -> bool:
    """Return whether all rounds of a run are done, so that nobody needs the lease."""
    return all(paths.round(number).record.exists() for number in range(config.rounds + 1))


def _in_flight(run: Run, submissions: Iterator[JobPaths]) -> InFlight | None:
    tasks: list[str] = []
    is_short = False
    look_again: int | None = None
    for paths in submissions:
        is_short = is_short or _lacks_workers(run, paths)
        if isinstance(paths, AttemptPaths):
            tasks += busy_tasks(run, paths)
            look_again = _look_again_minutes(run, paths.round, is_short=is_short)
        else:
            tasks += active_tasks(run.scheduler, known_tasks(run, paths))
    if not tasks and not is_short:
        return None
    return InFlight(tasks=tuple(tasks), waits_for_room=is_short, look_again_minutes=look_again)


def _unfinished_rounds(run: Run) -> Iterator[RoundPaths]:
    """Yield the rounds that were started and are not done."""
    for number in range(run.last_round + 1):
        paths = run.paths.round(number)
        if not paths.root.exists():
            return
        if not paths.record.exists():
            yield paths


def _unfinished_steps(run: Run) -> Iterator[JobPaths]:
    """Yield the last submission of each step that the next round needs."""
    if not run.paths.prepared.exists():
        yield from _last(run.paths.prepare_job)
    for paths in _unfinished_rounds(run):
        if paths.aggregate_record.exists():
            continue
        training = paths.number and not paths.collection.exists()
        yield from _last(paths.attempt if training else paths.aggregate_job)


def _unfinished_evaluations(run: Run) -> Iterator[JobPaths]:
    """Yield the last submission of each evaluation that is not done."""
    for paths in _unfinished_rounds(run):
        if not paths.evaluation_record.exists():
            yield from _last(paths.evaluation_job)


def _last(folder: Callable[[int], JobPaths]) -> Iterator[JobPaths]:
    yield from attempts_of(folder)[-1:]


def _lacks_workers(run: Run, paths: JobPaths) -> bool:
    """Return whether a submission has tasks that were not submitted yet."""
    plan = run.known_records.read(SubmissionRecord, paths.submission)
    jobs = run.known_records.find(JobsRecord, paths.jobs)
    planned = sum(workers.tasks for workers in plan.workers.values())
    unsent = unsent_arrays(plan, jobs)
    return bool(unsent) or planned > sum(array.tasks for array in plan.arrays)


def _look_again_minutes(run: Run, paths: RoundPaths, *, is_short: bool) -> int | None:
    """Return the minutes until a training round may have more to do while its arrays run."""
    minutes: list[int] = []
    has_over_sample = run.known_records.read(CohortRecord, paths.cohort).enough is not None
    if is_short or has_over_sample:
        minutes.append(_LOOK_AGAIN_MINUTES)
    deadline_minutes = run.config.clients.deadline_minutes
    if deadline_minutes is not None:
        left = deadline_minutes - age_seconds(paths.cohort) / 60.0
        minutes.append(math.ceil(left) if left > 0 else _LOOK_AGAIN_MINUTES)
    if linger_minutes := run.config.scheduler.linger_minutes:
        # workers without work stay idle, so no task ends when the training does
        minutes.append(max(1, int(linger_minutes / 2)))
    return min(minutes, default=None)
