"""Write the plan, then submit; find again what was submitted before a coordinator died."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fedllm.errors import ConfigError, FedllmError, Incomplete, RunFailed, UserError
from fedllm.planning.classes import job_options
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import Job, TaskState
from fedllm.storage.paths import JobPaths, aside
from fedllm.storage.records import ArrayRecord, ErrorRecord, JobsRecord, SubmissionRecord

SingleProgram = Literal["prepare", "aggregate", "evaluate"]


def submit(run: Run, paths: JobPaths, plan: SubmissionRecord, logs: Path) -> None:
    """Publish the plan, submit its arrays and record their ids."""
    run.publish(plan, paths.submission)
    _send(run, paths, plan, logs, search=False)


def is_active(run: Run, paths: JobPaths, logs: Path) -> bool:
    """Say whether anything of a submission may still be at work.

    A plan without ids was left by a coordinator that died between its intent and the record of
    the ids: its arrays are looked up by name, and submitted where there are none. Should both
    exist in the end, the second finds nothing to do.
    """
    plan = SubmissionRecord.read(paths.submission)
    if not paths.jobs.exists():
        _send(run, paths, plan, logs, search=True)
    states = run.scheduler.states(task_ids(paths))
    return any(state is not TaskState.GONE for state in states.values())


def task_ids(paths: JobPaths) -> list[str]:
    """Return the ids of all tasks of a submission."""
    jobs = JobsRecord.find(paths.jobs)
    return [id_ for ids in jobs.ids.values() for id_ in ids] if jobs else []


def _send(run: Run, paths: JobPaths, plan: SubmissionRecord, logs: Path, *, search: bool) -> None:
    ids: dict[str, list[str]] = {}
    try:
        for array in plan.arrays:
            found = run.scheduler.find(array.name) if search else None
            if found is None:
                run.lease.check()
                found = run.scheduler.submit(_job(plan, array, logs))
            ids[array.name] = found
    except ConfigError:
        _withdraw(run, paths, ids)
        raise
    run.publish(JobsRecord(ids=ids), paths.jobs)


def _withdraw(run: Run, paths: JobPaths, ids: dict[str, list[str]]) -> None:
    """Let go of what the scheduler refused: the next plan is made of the mended configuration.

    Arrays that it took before stay known, and the plan with them.
    """
    if ids:
        run.publish(JobsRecord(ids=ids), paths.jobs)
        return
    run.lease.check()
    paths.root.rename(aside(paths.root, "refused"))


def _job(plan: SubmissionRecord, array: ArrayRecord, logs: Path) -> Job:
    arguments = tuple(plan.command)
    if plan.kind == "client":
        arguments += ("--class", array.worker_class)
    return Job(
        name=array.name,
        program=plan.kind,
        argv=arguments,
        tasks=array.tasks,
        options=array.options,
        log_folder=logs,
    )


def array_name(run: Run, round_number: int, step: str) -> str:
    """Return a name that identifies run, round, and attempt, class and number in `step`."""
    return f"fedllm-{run.record.run_id}-r{round_number:04d}-{step}"


def single_job(
    run: Run,
    *,
    kind: SingleProgram,
    folder: Callable[[int], JobPaths],
    target: Path,
    done: Path,
    round_number: int,
) -> None:
    """Make progress on a job that is one task, unless its record `done` exists.

    Args:
        run: the run.
        kind: which program.
        folder: the paths of attempt 1, 2, ...
        target: the directory that the program works on.
        done: the record that the job writes last.
        round_number: for its name and logs; 0 for prepare.

    Raises:
        FedllmError: the job said why it stopped, or it failed again and again.
    """
    if done.exists():
        return
    logs = run.paths.logs(round_number)
    number = last_attempt(folder)
    if number:
        paths = folder(number)
        if is_active(run, paths, logs) or not run.settled(paths.root) or done.exists():
            return
        if SubmissionRecord.read(paths.submission).lease == run.lease.number:
            error = job_error(run, paths, logs)
            if isinstance(error, UserError | Incomplete) or _is_last(run, folder, number):
                raise error
            run.say(f"{error}; trying again")
    paths = folder(number + 1)
    token = array_name(run, round_number, f"{kind}-{number + 1:02d}")
    options = job_options(run.config.scheduler.sbatch, kind)
    plan = SubmissionRecord(
        token=token,
        lease=run.lease.number,
        kind=kind,
        command=[str(target), "--job", str(paths.root)],
        arrays=[ArrayRecord(name=token, worker_class=kind, tasks=1, options=options)],
    )
    submit(run, paths, plan, logs)


def last_attempt(folder: Callable[[int], JobPaths]) -> int:
    """Return the number of the last attempt whose plan exists, 0 if none."""
    number = 0
    while folder(number + 1).submission.exists():
        number += 1
    return number


def _is_last(run: Run, folder: Callable[[int], JobPaths], number: int) -> bool:
    mine = sum(
        SubmissionRecord.read(folder(n).submission).lease == run.lease.number
        for n in range(1, number + 1)
    )
    return mine >= run.config.scheduler.max_attempts


def job_error(run: Run, paths: JobPaths, logs: Path) -> FedllmError:
    """Return why a job ended without its record: what it said itself, else the scheduler."""
    told = ErrorRecord.find(paths.error)
    if told:
        return error_of(told)
    ids = task_ids(paths)
    endings = run.scheduler.endings(ids)
    ended = "; ".join(f"{id_}: {ending}" for id_, ending in endings.items()) or "it left no record"
    kind = SubmissionRecord.read(paths.submission).kind
    return RunFailed(f"{kind} job ended early ({ended}); see {logs}")


def error_of(record: ErrorRecord) -> FedllmError:
    """Return the error that a job recorded, with its exit code."""
    kinds = {UserError.exit_code: UserError, Incomplete.exit_code: Incomplete}
    log = f"; log {record.log}" if record.log else ""
    return kinds.get(record.exit_code, RunFailed)(f"{record.message}{log}")
