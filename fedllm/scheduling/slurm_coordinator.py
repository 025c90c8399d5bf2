"""The coordinator as a Slurm job: submitted once, requeued by Slurm, known to the lease."""

import contextlib
import os
import shlex
import sys
from pathlib import Path

from fedllm.config.models import Config
from fedllm.errors import LeaseError, UserError
from fedllm.planning.classes import job_options
from fedllm.scheduling.seam import SchedulerUnreachable
from fedllm.scheduling.slurm_commands import CommandRefused, call, clean_environment
from fedllm.scheduling.slurm_options import refusal, sbatch_flags
from fedllm.scheduling.slurm_queue import named, squeue
from fedllm.storage.lease import process_is_gone
from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.publish import storage_errors
from fedllm.storage.records import LeaseRecord


def submit_coordinator(run_root: Path, config: Config, run_id: str) -> str:
    """Submit a small job that goes on with the run in `run_root`, and return its id.

    The job is `slurm/coordinator.sbatch` with the options of `scheduler.sbatch.coordinator`; it
    reads `config.yaml` of the run directory, which has to be there, and logs beside the rounds.

    Raises:
        LeaseError: such a job waits or runs already.
        ConfigError: sbatch refuses an option; the message names its key.
        SchedulerUnreachable: slurmctld does not answer.
    """
    paths = RunPaths(root=run_root.resolve())
    name = f"fedllm-{run_id}-coordinator"
    if there := _waiting_or_running(name):
        raise LeaseError(
            f"{run_root}: its coordinator waits or runs as Slurm job {there}; "
            f"wait for it, or end it with: scancel {there}"
        )
    with storage_errors(paths.all_logs):
        paths.all_logs.mkdir(parents=True, exist_ok=True)
    section = config.scheduler
    options = job_options(section.sbatch, "coordinator")
    flags = sbatch_flags(options, sbatch=section.sbatch, program="coordinator", defaults={})
    environment = clean_environment(configured=flags)
    environment["FEDLLM_PYTHON"] = section.python or shlex.quote(sys.executable)
    environment["FEDLLM_SETUP"] = "\n".join(section.setup)
    words = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        f"--output={paths.all_logs / 'coordinator-%j.log'}",
        *(f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()),
        str(shipped("slurm/coordinator.sbatch")),
        str(paths.config),
        "--run-dir",
        str(paths.root),
    ]
    try:
        # on a cluster of clusters: `id;cluster`
        return call(words, environment=environment).strip().partition(";")[0]
    except CommandRefused as error:
        raise refusal(str(error), flags, sbatch=section.sbatch, program="coordinator") from error


def job_is_gone(job: str) -> bool | None:
    """Say whether a job, of any user, neither waits nor runs; None: it cannot be said here."""
    try:
        return not call(["squeue", "--noheader", f"--jobs={job}", "-o", "%T"]).strip()
    except CommandRefused as error:
        return True if "invalid job id" in str(error).lower() else None
    except (SchedulerUnreachable, UserError):
        return None


def holder_is_gone(holder: LeaseRecord) -> bool | None:
    """Say whether a coordinator ended: Slurm knows of its job, this machine of its process.

    A holder in our own job is an earlier start of this requeued job, unless its process lives.
    """
    if holder.slurm_job is None:
        return process_is_gone(holder)
    if holder.slurm_job == os.environ.get("SLURM_JOB_ID"):
        return process_is_gone(holder) is not False
    return job_is_gone(holder.slurm_job)


def cancel_job(job: str) -> None:
    """End a coordinator's job; one that is gone is passed over.

    Raises:
        SchedulerUnreachable: slurmctld cannot be asked now.
    """
    with contextlib.suppress(CommandRefused):
        call(["scancel", "--quiet", job])


def _waiting_or_running(name: str) -> str | None:
    """Return the id of a job of ours named `name` that waits or runs.

    Raises:
        SchedulerUnreachable: slurmctld cannot be asked now.
    """
    try:
        return next(iter(named(name, squeue("-o", "%i|%j"))), None)
    except CommandRefused as error:
        raise SchedulerUnreachable(f"squeue: {error}") from error
