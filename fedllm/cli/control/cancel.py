"""`fedllm cancel`: end the jobs of a run and its coordinator."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    RunOrSweep,
    existing_run,
    say,
)
from fedllm.cli.sweeps import existing_sweep
from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import counted
from fedllm.planning.backoff import Backoff
from fedllm.rounds.dispatch.cancelling import cancel_jobs
from fedllm.rounds.dispatch.in_flight import is_done
from fedllm.scheduling.seam import CancelRefused
from fedllm.scheduling.slurm.coordinator_job import (
    cancel_job,
    coordinator_jobs,
    job_is_gone,
)
from fedllm.scheduling.traits import traits_of
from fedllm.storage.lease import current_lease, process_is_gone
from fedllm.storage.paths import RunPaths, SweepPaths
from fedllm.storage.records import CoordinatorJobRecord, RunRecord
from fedllm.storage.sweep_records import SweepRecord
from fedllm.storage.trust.place import is_here

_MAX_PAUSE_SECONDS = 30.0


def cancel(
    run: RunOrSweep,
    jobs_only: Annotated[
        bool, typer.Option("--jobs-only", help="Leave the coordinator running.")
    ] = False,
) -> None:
    """End the jobs and coordinators of a run or a sweep.

    `fedllm resume` continues them.
    """
    sweep = existing_sweep(run)
    if sweep is None:
        _cancel_run(existing_run(run), jobs_only=jobs_only)
        return
    record = SweepRecord.read(sweep.record)
    for job in [] if jobs_only else _coordinators(sweep, record):
        say(_end_job(job))
    for item in record.runs:
        paths = sweep.run(item.name)
        if paths.run.exists() and not is_done(paths, read_config(paths.config)):
            say(f"{item.name}:")
            _cancel_run(paths, jobs_only=jobs_only)


def _coordinators(paths: SweepPaths, record: SweepRecord) -> list[str]:
    """Return the jobs that coordinate a sweep and wait or run."""
    submitted = CoordinatorJobRecord.find(paths.coordination.coordinator_job)
    return list(coordinator_jobs(record.sweep_id)) if submitted else []


def _cancel_run(paths: RunPaths, *, jobs_only: bool) -> None:
    record = RunRecord.read(paths.run)
    if record.place and not is_here(record.place, paths.root):
        say(
            f"{paths.root}: a copy of {record.place.path}, or moved from there: no job of its own "
            f"is running; to end those of run {record.run_id}: fedllm cancel {record.place.path}"
        )
        return
    config = read_config(paths.config)
    refusals = [] if jobs_only else _end_coordinator(paths, config)
    scheduler = execution.make_scheduler(paths, config)
    try:
        ended = cancel_jobs(paths, config, scheduler)
        say(f"{counted(ended, 'task')} cancelled" if ended else "no task was running")
    except CancelRefused as error:
        refusals.append(error)
    finally:
        scheduler.close()
    if refusals:
        raise CancelRefused("\n".join(map(str, refusals)))


def _end_coordinator(paths: RunPaths, config: Config) -> list[CancelRefused]:
    """End the coordinator; return the refusals to end its jobs or its process."""
    refusals: list[CancelRefused] = []
    is_any = False
    for end in (partial(_end_jobs, paths, config), partial(_end_holder, paths)):
        try:
            for line in end():
                is_any = True
                say(line)
        except CancelRefused as error:
            refusals.append(error)
    if not is_any and not refusals:
        say("no coordinator is running")
    return refusals


def _end_jobs(paths: RunPaths, config: Config) -> Iterator[str]:
    """End all jobs of the coordinator, until none is left: a link may submit another."""
    if not traits_of(config).jobs_outlive_coordinator:
        return
    run_id = RunRecord.read(paths.run).run_id
    submitted = CoordinatorJobRecord.find(paths.coordinator_job)
    # squeue may leave it out: it is asked for by its id
    if submitted and not coordinator_jobs(run_id) and job_is_gone(submitted.job) is False:
        yield _end_job(submitted.job)
    while jobs := list(coordinator_jobs(run_id)):
        # the last one first: a successor starts when its predecessor ends
        for job in reversed(jobs):
            yield _end_job(job)


def _end_job(job: str) -> str:
    cancel_job(job)
    _await_end(partial(job_is_gone, job))
    return f"coordinator job {job} cancelled"


def _end_holder(paths: RunPaths) -> Iterator[str]:
    """End the coordinator that holds the lease: a process, or a job submitted by hand."""
    number, holder = current_lease(paths)
    if holder is None or paths.released(number).exists():
        return
    if holder.slurm_job:
        if not job_is_gone(holder.slurm_job, holder.user):
            yield _end_job(holder.slurm_job)
        return
    gone = process_is_gone(holder)
    if gone is None:
        yield f"coordinator {number} is on {holder.host}, pid {holder.pid}: end it there"
    elif not gone:
        try:
            os.kill(holder.pid, signal.SIGTERM)
        except PermissionError as error:
            raise CancelRefused(
                f"coordinator {number} (pid {holder.pid}) is another user's process: "
                "its owner or an admin has to end it"
            ) from error
        _await_end(partial(process_is_gone, holder))
        yield f"coordinator {number} (pid {holder.pid}) told to stop"


def _await_end(is_gone: Callable[[], bool | None]) -> None:
    """Wait for a coordinator that was told to stop: it may submit jobs until it ends."""
    pause = Backoff(0.1, max_seconds=_MAX_PAUSE_SECONDS)
    while not is_gone() and pause.seconds < _MAX_PAUSE_SECONDS:
        time.sleep(pause.seconds)
        pause.fail()
