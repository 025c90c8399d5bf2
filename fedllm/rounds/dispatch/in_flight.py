"""What of a run is at work now, so that whoever need not watch knows what to wait for."""

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

# how often to look for enough updates while workers are still busy
_LOOK_AGAIN_MINUTES = 5


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """What the next step of a run waits for.

    Attributes:
        tasks: the tasks that are at work on it.
        waits_for_room: more are wanted than the limits on submitted jobs left room for.
        look_again_minutes: when there may be more to do although tasks are still at work: None
            if that cannot be.
    """

    tasks: tuple[str, ...]
    waits_for_room: bool = False
    look_again_minutes: int | None = None


def find_in_flight(run: Run) -> InFlight:
    """Return what is at work; evaluations where nothing else is, as no other step needs them."""
    return _work(run, _unfinished(run)) or _work(run, _unevaluated(run)) or InFlight(tasks=())


def is_done(paths: RunPaths, config: Config) -> bool:
    """Say whether all rounds of a run are done: then there is nothing to hold a lease for."""
    return all(paths.round(number).record.exists() for number in range(config.rounds + 1))


def _work(run: Run, submissions: Iterator[JobPaths]) -> InFlight | None:
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


def _begun(run: Run) -> Iterator[RoundPaths]:
    for number in range(run.config.rounds + 1):
        paths = run.paths.round(number)
        if not paths.root.exists():
            return
        if not paths.record.exists():
            yield paths


def _unfinished(run: Run) -> Iterator[JobPaths]:
    """Return the last submission for each step before the next round."""
    if not run.paths.prepared.exists():
        yield from _last(run.paths.prepare_job)
    for paths in _begun(run):
        if paths.aggregate_record.exists():
            continue
        training = paths.number and not paths.collection.exists()
        yield from _last(paths.attempt if training else paths.aggregate_job)


def _unevaluated(run: Run) -> Iterator[JobPaths]:
    for paths in _begun(run):
        if not paths.evaluation_record.exists():
            yield from _last(paths.evaluation_job)


def _last(folder: Callable[[int], JobPaths]) -> Iterator[JobPaths]:
    yield from attempts_of(folder)[-1:]


def _lacks_workers(run: Run, paths: JobPaths) -> bool:
    """Say whether a submission wants more tasks than were submitted."""
    plan = run.known_records.read(SubmissionRecord, paths.submission)
    jobs = run.known_records.find(JobsRecord, paths.jobs)
    wanted = sum(workers.tasks for workers in plan.workers.values())
    unsent = unsent_arrays(plan, jobs)
    return bool(unsent) or wanted > sum(array.tasks for array in plan.arrays)


def _look_again_minutes(run: Run, paths: RoundPaths, *, is_short: bool) -> int | None:
    """Return when a round that trains may have more to do before its arrays end."""
    found: list[int] = []
    is_cut_short = run.known_records.read(CohortRecord, paths.cohort).enough is not None
    if is_short or is_cut_short:
        found.append(_LOOK_AGAIN_MINUTES)
    deadline_minutes = run.config.clients.deadline_minutes
    if deadline_minutes is not None:
        left = deadline_minutes - age_seconds(paths.cohort) / 60.0
        found.append(math.ceil(left) if left > 0 else _LOOK_AGAIN_MINUTES)
    if linger_minutes := run.config.scheduler.linger_minutes:
        # workers that are through stay: they do not tell by their end
        found.append(max(1, int(linger_minutes / 2)))
    return min(found, default=None)
