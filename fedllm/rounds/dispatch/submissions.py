"""Submissions: write the plan, then submit; find arrays that a dead coordinator submitted."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedllm.config.models import Config
from fedllm.errors import ConfigError, FedllmError, Incomplete, RunFailed, UserError
from fedllm.planning.classes import job_options
from fedllm.planning.engines import engines_of, job_size
from fedllm.rounds.dispatch.visibility import visibility_problem
from fedllm.rounds.run import Run
from fedllm.scheduling.endings import reason_of
from fedllm.scheduling.seam import (
    EndReason,
    Job,
    Scheduler,
    SchedulerFull,
    SubmissionUnknown,
    TaskState,
)
from fedllm.storage.paths import JobPaths, attempts_of, backup_name
from fedllm.storage.records import (
    ArrayRecord,
    BundleRecord,
    DoubtRecord,
    EndingRecord,
    ErrorRecord,
    JobsRecord,
    OutcomeRecord,
    SubmissionRecord,
)

ServerProgram = Literal["prepare", "aggregate", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The tasks of a job, and the bundles that they claim; a single task needs none."""

    tasks: int = 1
    bundles: Sequence[BundleRecord] = ()


ONE_TASK = Shares()


def submit(run: Run, paths: JobPaths, plan: SubmissionRecord, logs: Path) -> None:
    """Publish a new plan, submit its arrays and record their ids."""
    run.freeze(plan, paths.submission)
    _send(run, paths, plan, logs, search=False)


def submit_more(run: Run, paths: JobPaths, plan: SubmissionRecord, logs: Path) -> None:
    """Publish a plan with further arrays in place of the one before, and submit these."""
    run.publish(plan, paths.submission)
    _send(run, paths, plan, logs, search=False)


def _is_active(run: Run, paths: JobPaths, logs: Path) -> bool:
    """Return whether a submission has tasks that may still run, or has yet to be submitted."""
    return not submit_unsent(run, paths, logs) or bool(
        active_tasks(run.scheduler, known_tasks(run, paths))
    )


def submit_unsent(run: Run, paths: JobPaths, logs: Path) -> bool:
    """Submit the arrays of a plan that have no recorded id; return False if there is no room yet.

    A coordinator may have died after it wrote the plan and before it recorded the ids. So each
    array is looked up by name first, and submitted only if the scheduler knows none. If both exist
    in the end, the second array finds nothing to do.
    """
    plan = run.known_records.read(SubmissionRecord, paths.submission)
    jobs = run.known_records.find(JobsRecord, paths.jobs)
    unsent = unsent_arrays(plan, jobs)
    if not unsent and jobs:
        return True
    # arrays that found no room were not submitted: no need to look them up
    search = not unsent <= run.observations.no_room
    if search or run.observations.is_due(paths.root, run.config.scheduler.query_seconds):
        return _send(run, paths, plan, logs, search=search)
    return False


def unsent_arrays(plan: SubmissionRecord, jobs: JobsRecord | None) -> set[str]:
    """Return the names of the plan's arrays that have no recorded id."""
    return {array.name for array in plan.arrays} - (jobs.ids.keys() if jobs else set())


def find_unrecorded(run: Run, paths: JobPaths) -> None:
    """Record the ids of arrays whose coordinator died before it recorded them; submit nothing."""
    plan = run.known_records.read(SubmissionRecord, paths.submission)
    jobs = run.known_records.find(JobsRecord, paths.jobs)
    ids = dict(jobs.ids) if jobs else {}
    unsent = unsent_arrays(plan, jobs) - run.observations.no_room
    unrecorded = {name: tasks for name in sorted(unsent) if (tasks := run.scheduler.find(name))}
    if unrecorded:
        _record_jobs(run, paths, ids | unrecorded)


def active_tasks(scheduler: Scheduler, ids: Sequence[str]) -> list[str]:
    """Return the tasks that may still wait or run."""
    states = scheduler.states(ids) if ids else {}
    return [id_ for id_, state in states.items() if state is not TaskState.GONE]


def known_tasks(run: Run, paths: JobPaths) -> list[str]:
    """Return the ids of all tasks of a submission."""
    return _tasks(run.known_records.find(JobsRecord, paths.jobs), run.scheduler)


def task_ids(paths: JobPaths, scheduler: Scheduler) -> list[str]:
    """Return the ids of all tasks of a submission, read without a coordinator's cache."""
    return _tasks(JobsRecord.find(paths.jobs), scheduler)


def _tasks(jobs: JobsRecord | None, scheduler: Scheduler) -> list[str]:
    if jobs is None:
        return []
    for name, user in jobs.users.items():
        if user != os.geteuid():
            scheduler.attribute(jobs.ids.get(name, []), user)
    return [id_ for ids in jobs.ids.values() for id_ in ids]


def _record_jobs(run: Run, paths: JobPaths, ids: dict[str, list[str]]) -> None:
    """Record the ids of arrays; those without a recorded user are this one's."""
    known = run.known_records.find(JobsRecord, paths.jobs)
    before = known.users if known else {}
    # an array of an earlier version has no user
    new = ids.keys() - (known.ids.keys() if known else set())
    users = before | dict.fromkeys(sorted(new), os.geteuid())
    run.publish(JobsRecord(ids=ids, users=users), paths.jobs)


def _send(run: Run, paths: JobPaths, plan: SubmissionRecord, logs: Path, *, search: bool) -> bool:
    jobs = run.known_records.find(JobsRecord, paths.jobs)
    ids = dict(jobs.ids) if jobs else {}
    has_room = True
    try:
        for array in (array for array in plan.arrays if array.name not in ids):
            ids[array.name] = _submit_once(run, paths, job_of(plan, array, logs), search=search)
            run.observations.no_room.discard(array.name)
    except SchedulerFull as error:
        has_room = False
        if array.name not in run.observations.no_room:
            run.say(f"{array.name}: waits for room in the queue ({error})")
        rest = [array.name for array in plan.arrays if array.name not in ids]
        # after this search nobody needs to look them up again
        ids |= {name: tasks for name in rest if search and (tasks := run.scheduler.find(name))}
        run.observations.no_room |= set(rest) - ids.keys()
    except SubmissionUnknown:
        if ids:
            _record_jobs(run, paths, ids)
        raise
    except ConfigError:
        _withdraw(run, paths, plan, ids)
        raise
    if has_room or ids:
        _record_jobs(run, paths, ids)
    return has_room


def _submit_once(run: Run, paths: JobPaths, job: Job, *, search: bool) -> list[str]:
    """Submit an array unless the scheduler has it already; return its tasks.

    Raises:
        SubmissionUnknown: nobody knows whether an earlier submission of it succeeded.
    """
    doubt = run.known_records.find(DoubtRecord, paths.in_doubt)
    in_doubt = doubt is not None and doubt.name == job.name
    tasks = run.scheduler.find(job.name) if search or in_doubt else None
    if tasks is not None:
        return tasks
    if doubt and in_doubt:
        raise SubmissionUnknown(doubt.said).kept_in(paths.in_doubt)
    run.lease.check()
    try:
        return run.scheduler.submit(job)
    except SubmissionUnknown as error:
        # recorded even if the lease was lost meanwhile: its new holder must not submit again
        DoubtRecord(name=job.name, said=str(error)).publish(paths.in_doubt)
        raise error.kept_in(paths.in_doubt) from error


def _withdraw(run: Run, paths: JobPaths, plan: SubmissionRecord, ids: dict[str, list[str]]) -> None:
    """Withdraw arrays that the scheduler refused: a corrected configuration makes the next plan.

    The plan keeps the arrays that were submitted before and the workers that were taken over.
    """
    if not ids and not plan.adopted:
        run.lease.check()
        paths.root.rename(backup_name(paths.root, "refused"))
        return
    arrays = [array for array in plan.arrays if array.name in ids]
    sent = Counter[str]()
    for array in arrays:
        sent[array.worker_class] += array.tasks
    workers = {
        name: record.model_copy(update={"tasks": sent[name]})
        for name, record in plan.workers.items()
        if name in sent
    }
    kept = plan.model_copy(update={"arrays": arrays, "workers": workers})
    run.publish(kept, paths.submission)
    _record_jobs(run, paths, ids)


def job_of(plan: SubmissionRecord, array: ArrayRecord, logs: Path) -> Job:
    """Return the scheduler's job for an array of a plan."""
    arguments = tuple(plan.command)
    worker_class = array.worker_class if plan.kind == "client" else None
    if worker_class is not None:
        arguments += ("--class", worker_class)
    return Job(
        name=array.name,
        program=plan.kind,
        argv=arguments,
        worker_class=worker_class,
        tasks=array.tasks,
        parallel=array.parallel,
        processes_per_task=array.processes,
        nodes_per_task=array.nodes,
        options=array.options,
        log_folder=logs / array.logs,
    )


def array_name(run_id: str, round_number: int, step: str, attempt: str) -> str:
    """Return the name of a submission: round and step first, since squeue cuts names.

    Its arrays append their class and number.
    """
    return f"r{round_number:02d}-{step}-fedllm-{run_id}-{attempt}"


def is_of_run(plan: SubmissionRecord, run_id: str) -> bool:
    """Say whether a plan is this run's own; one that came with a copy names tasks of another."""
    return f"fedllm-{run_id}-" in plan.token


def run_server_job(
    run: Run,
    *,
    kind: ServerProgram,
    folder: Callable[[int], JobPaths],
    target: Path,
    done: Path,
    round_number: int,
    share: Callable[[], Shares] = lambda: ONE_TASK,
) -> None:
    """Make progress on a job of the server, unless its record `done` exists.

    Args:
        run: the run.
        kind: the job's program.
        folder: attempt number (from 1) -> its paths.
        target: the directory that the program works on.
        done: the record that the job writes last.
        round_number: round in its name and logs; 0 for prepare.
        share: returns the tasks of a new attempt, and what they claim.

    Raises:
        FedllmError: the job recorded why it stopped, or `scheduler.max_attempts` attempts failed.
    """
    if done.exists():
        return
    run.observations.step = (kind, round_number)
    logs = run.paths.logs(round_number)
    number = len(attempts_of(folder))
    if number:
        paths = folder(number)
        if (
            _is_active(run, paths, logs)
            or not run.known_records.wait_is_over(paths.root)
            or done.exists()
        ):
            return
        outcome = record_outcome(run, paths)
        if is_since_start(run, paths):
            error = job_error(run, paths, logs, outcome)
            if isinstance(error, UserError | Incomplete) or _is_last(run, folder, number):
                raise error
            run.say(f"{error}; trying again")
    paths = folder(number + 1)
    token = array_name(run.record.run_id, round_number, kind, f"a{int(paths.root.name):02d}")
    shares = share()
    plan = SubmissionRecord(
        token=token,
        lease=run.lease.number,
        kind=kind,
        command=[str(target), "--job", str(paths.root)],
        arrays=[server_array(run.config, kind, token, tasks=shares.tasks)],
        bundles=list(shares.bundles),
    )
    submit(run, paths, plan, logs)


def server_array(config: Config, kind: ServerProgram, name: str, *, tasks: int = 1) -> ArrayRecord:
    """Return the array of a job of the server."""
    size = job_size(kind, engines_of(config))
    return ArrayRecord(
        name=name,
        worker_class=kind,
        tasks=tasks,
        options=job_options(config.scheduler.sbatch, kind),
        processes=size.processes,
        nodes=size.nodes,
    )


def is_since_start(run: Run, paths: JobPaths) -> bool:
    """Return whether a plan was made since a person last started the run."""
    return run.known_records.read(SubmissionRecord, paths.submission).lease >= run.lease.since


def _is_last(run: Run, folder: Callable[[int], JobPaths], number: int) -> bool:
    attempts = [folder(n) for n in range(1, number + 1) if is_since_start(run, folder(n))]
    spent = sum(not was_preempted(record_outcome(run, paths)) for paths in attempts)
    return spent >= run.config.scheduler.max_attempts


def record_outcome(
    run: Run,
    paths: JobPaths,
    *,
    checkpoints: Mapping[str, int] | None = None,
    progressed: bool = False,
) -> OutcomeRecord:
    """Record once how the tasks of a submission ended, as Slurm forgets it within minutes."""
    known = run.known_records.find(OutcomeRecord, paths.outcome)
    if known:
        return known
    plan = run.known_records.find(SubmissionRecord, paths.submission)
    adopted = plan.adopted if plan else []
    endings = run.scheduler.endings([*known_tasks(run, paths), *adopted])
    outcome = OutcomeRecord(
        endings={
            id_: EndingRecord(state=e.state, exit_code=e.exit_code, node=e.node, log=e.log)
            for id_, e in endings.items()
        },
        cancelled={id_: why for id_, why in run.observations.cancelled.items() if id_ in endings},
        checkpoints=dict(checkpoints or {}),
        progressed=progressed,
    )
    run.freeze(outcome, paths.outcome)
    return outcome


def was_preempted(outcome: OutcomeRecord) -> bool:
    """Return whether preemption alone ended a submission, which never counts as a retry.

    Tasks that were cancelled because nobody needed them do not matter; tasks that were cancelled
    because they were silent do.
    """
    reasons = {task: reason_of(ending) for task, ending in outcome.endings.items()}
    counted = {
        reason
        for task, reason in reasons.items()
        if reason is not EndReason.CANCELLED or task in outcome.cancelled
    }
    return counted == {EndReason.PREEMPTED}


def job_error(run: Run, paths: JobPaths, logs: Path, outcome: OutcomeRecord) -> FedllmError:
    """Return the error of a job that ended without its record: its own, else the scheduler's."""
    error = ErrorRecord.find(paths.error)
    if error:
        return error_of(error)
    ended = "; ".join(f"{id_}: {ending}" for id_, ending in outcome.endings.items())
    kind = run.known_records.read(SubmissionRecord, paths.submission).kind
    problem = visibility_problem(run.paths.root, kind, outcome.endings, logs)
    if problem:
        # if the first job cannot see the folder, no other will; later it may be one node's mount
        return UserError(problem) if kind == "prepare" else RunFailed(problem)
    return RunFailed(f"{kind} job ended early ({ended or 'it left no record'}); see {logs}")


def error_of(record: ErrorRecord) -> FedllmError:
    """Return the error that a job recorded, with its exit code."""
    kinds = {UserError.exit_code: UserError, Incomplete.exit_code: Incomplete}
    log = f"; log {record.log}" if record.log else ""
    return kinds.get(record.exit_code, RunFailed)(f"{record.message}{log}")
