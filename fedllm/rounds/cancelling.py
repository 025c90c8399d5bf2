"""End exactly the jobs of one run."""

from collections.abc import Iterator

from fedllm.config.models import Config
from fedllm.rounds.submissions import last_attempt, task_ids
from fedllm.scheduling.seam import Scheduler, TaskState
from fedllm.storage.paths import JobPaths, RunPaths
from fedllm.storage.records import SubmissionRecord


def cancel_jobs(paths: RunPaths, config: Config, scheduler: Scheduler) -> int:
    """Cancel every task of the run that is not gone; return how many there were."""
    ids: list[str] = []
    for job in _submissions(paths, config):
        recorded = task_ids(job)
        if not recorded:
            # submitted by a coordinator that died before it could record the ids
            for array in SubmissionRecord.read(job.submission).arrays:
                recorded += scheduler.find(array.name) or []
        ids += recorded
    states = scheduler.states(ids) if ids else {}
    alive = [id_ for id_, state in states.items() if state is not TaskState.GONE]
    if alive:
        scheduler.cancel(alive)
    return len(alive)


def _submissions(paths: RunPaths, config: Config) -> Iterator[JobPaths]:
    for number in range(1, last_attempt(paths.prepare_job) + 1):
        yield paths.prepare_job(number)
    for round_number in range(config.rounds + 1):
        round_paths = paths.round(round_number)
        if round_paths.record.exists():
            continue
        for folder in (round_paths.attempt, round_paths.aggregate_job, round_paths.evaluation_job):
            yield from (folder(number) for number in range(1, last_attempt(folder) + 1))
