"""Cancel exactly the jobs of one run, or tasks that it does not need."""

from collections.abc import Iterator, Sequence

from fedllm.config.models import Config
from fedllm.rounds.dispatch.submissions import active_tasks, is_of_run, task_ids
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import CancelRefused, Scheduler
from fedllm.storage.paths import JobPaths, RunPaths, attempts_of
from fedllm.storage.records import JobsRecord, RunRecord, SubmissionRecord


def end_tasks(run: Run, tasks: Sequence[str], *, only_waiting: bool = False) -> bool:
    """End tasks that the run does not need; say so and return False if the scheduler refuses.

    Those that started since the scheduler's last answer are left alone if `only_waiting`.

    Another member of the group may own them. They find nothing to do, so the run goes on.
    """
    run.lease.check()
    try:
        run.scheduler.cancel(tasks, only_waiting=only_waiting)
    except CancelRefused as error:
        if run.observations.is_new(("refused", *tasks)):
            run.say(f"{error}; the run goes on")
        return False
    return True


def cancel_jobs(paths: RunPaths, config: Config, scheduler: Scheduler) -> int:
    """Cancel every task of the run that has not ended; return their number.

    Raises:
        CancelRefused: some are another user's.
    """
    run_id = RunRecord.read(paths.run).run_id
    ids: dict[str, None] = {}
    for job in _submissions(paths, config):
        plan = SubmissionRecord.read(job.submission)
        if not is_of_run(plan, run_id):
            continue
        ids |= dict.fromkeys([*task_ids(job, scheduler), *plan.adopted])
        jobs = JobsRecord.find(job.jobs)
        for array in plan.arrays:
            if jobs is None or array.name not in jobs.ids:
                # a coordinator submitted this array and died before it could record the ids
                ids |= dict.fromkeys(scheduler.find(array.name) or [])
    alive = active_tasks(scheduler, list(ids))
    if alive:
        scheduler.cancel(alive)
    return len(alive)


def _submissions(paths: RunPaths, config: Config) -> Iterator[JobPaths]:
    yield from attempts_of(paths.prepare_job)
    for asked in paths.all_requested():
        yield from attempts_of(asked.job)
    for round_number in range(config.rounds + 1):
        round_paths = paths.round(round_number)
        # workers may end after their round, or wait idle for any later one
        is_past = round_paths.record.exists() and paths.round(round_number + 1).record.exists()
        if is_past and not config.scheduler.linger_minutes:
            continue
        for folder in (
            round_paths.attempt,
            round_paths.aggregate_job,
            round_paths.evaluation_job,
        ):
            yield from attempts_of(folder)
