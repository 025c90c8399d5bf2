"""The coordinator's jobs on Slurm: one that requeues itself, or a chain; known to the lease."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence

from fedllm.config.models import Config, SchedulerSection
from fedllm.errors import ConfigError, LeaseError, UserError
from fedllm.planning.classes import job_options
from fedllm.scheduling.seam import SchedulerFull, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm_capacity import Surveyor
from fedllm.scheduling.slurm_check import problems
from fedllm.scheduling.slurm_commands import (
    CommandRefused,
    InstalledCommands,
    call,
    clean_environment,
)
from fedllm.scheduling.slurm_options import Flags, refusal, says_no_room, sbatch_flags
from fedllm.storage.lease import process_is_gone
from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.publish import storage_errors
from fedllm.storage.records import CoordinatorJobRecord, LeaseRecord

_SCRIPTS = {"resident": "slurm/coordinator.sbatch", "chained": "slurm/chain.sbatch"}
_OPTION = re.compile(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", re.MULTILINE)


def coordinator_flags(section: SchedulerSection) -> Flags:
    """Return the options of the coordinator's job: the configured ones, over those of its script.

    Raises:
        ConfigError: an option that fedllm sets itself.
    """
    written = shipped(_SCRIPTS[section.coordinator]).read_text(encoding="utf-8")
    own = {name: value or True for name, value in _OPTION.findall(written)}
    defaults = {name: own[name] for name in ("time", "requeue", "signal") if name in own}
    options = job_options(section.sbatch, "coordinator")
    return sbatch_flags(options, sbatch=section.sbatch, program="coordinator", defaults=defaults)


def check_coordinator(section: SchedulerSection) -> None:
    """Refuse a coordinator's job that Slurm would refuse, or take and never start.

    Raises:
        ConfigError: a line for everything that is wrong, with its key.
        SchedulerUnreachable: slurmctld does not answer.
    """

    def test(words: Sequence[str], flags: Flags) -> None:
        call(words, environment=clean_environment(configured=flags))

    flags = coordinator_flags(section)
    surveyor = Surveyor(commands=InstalledCommands(), query_seconds=section.query_seconds)
    found = problems(
        flags, section=section, program="coordinator", survey=surveyor.survey(flags), test=test
    )
    if told := "\n".join(found):
        raise ConfigError(told)


def submit_coordinator(paths: RunPaths, config: Config, run_id: str) -> str:
    """Submit a small job that goes on with a run, as `scheduler.coordinator` says; return its id.

    Its options are those of `scheduler.sbatch.coordinator`; it reads `config.yaml` of the run
    directory, which has to be there, and logs beside the rounds.

    Raises:
        LeaseError: such a job waits or runs already.
        ConfigError: sbatch refuses an option; the message names its key.
        SchedulerFull: limits on submitted jobs leave no room now.
        SchedulerUnreachable: slurmctld does not answer.
    """
    refuse_second(paths, run_id)
    if config.scheduler.coordinator == "chained":
        return submit_link(paths, config, run_id)
    words = [str(paths.config), "--run-dir", str(paths.root)]
    job = _submit(paths, config, run_id, "coordinator", log="coordinator-%j.log", words=words)
    CoordinatorJobRecord(job=job, mode="resident").publish(paths.coordinator_job)
    return job


def submit_link(
    paths: RunPaths, config: Config, run_id: str, *, after: str | None = None, lost: int = 0
) -> str:
    """Submit a link of the chain, which starts once job `after` has ended; return its id.

    Raises:
        ConfigError: sbatch refuses an option; the message names its key.
        SchedulerFull: limits on submitted jobs leave no room now.
        SchedulerUnreachable: slurmctld does not answer.
    """
    options = [f"--dependency=afterany:{after},singleton"] if after else []
    job = _submit(
        paths, config, run_id, "chain", *options, log="chain.log", words=[str(paths.root)]
    )
    CoordinatorJobRecord(job=job, mode="chained", lost=lost).publish(paths.coordinator_job)
    return job


def refuse_second(paths: RunPaths, run_id: str) -> None:
    """Refuse a second coordinator's job.

    Raises:
        LeaseError: one waits or runs.
        SchedulerUnreachable: slurmctld cannot be asked now.
    """
    if there := list(coordinator_jobs(run_id)):
        raise LeaseError(
            f"{paths.root}: its coordinator waits or runs as Slurm job {', '.join(there)}; wait "
            f"for it, or end it with: fedllm cancel {paths.root}"
        )


def coordinator_jobs(run_id: str) -> dict[str, TaskState]:
    """Return the coordinator's jobs that wait or run, the oldest first.

    Raises:
        SchedulerUnreachable: slurmctld cannot be asked now.
    """
    words = ["squeue", "--noheader", f"--user={os.getuid()}", f"--name={_name(run_id)}"]
    try:
        lines = call([*words, "-o", "%i|%T"]).splitlines()
    except CommandRefused as error:
        raise SchedulerUnreachable(f"squeue: {error}") from error
    found = {}
    for line in lines:
        job, _, state = line.strip().partition("|")
        found[job] = TaskState.WAITING if state == "PENDING" else TaskState.RUNNING
    return dict(sorted(found.items(), key=lambda each: int(each[0])))


def start_after(job: str, arrays: Sequence[str]) -> None:
    """Have a link that waits start once all arrays have ended.

    Raises:
        SchedulerUnreachable: slurmctld does not answer.
    """
    _update(job, f"dependency=afterany:{':'.join(arrays)},singleton")


def start_after_any(job: str, arrays: Sequence[str], *, minutes_after: tuple[str, int]) -> None:
    """Have a link that waits start once one of the arrays has ended, or so long after a job began.

    Raises:
        SchedulerUnreachable: slurmctld does not answer.
    """
    # no `singleton`: it would be one more of the conditions that suffice
    other, minutes = minutes_after
    ended = [f"afterany:{array}" for array in arrays]
    _update(job, f"dependency={'?'.join([*ended, f'after:{other}+{minutes}'])}")


def start_later(job: str, seconds: float) -> None:
    """Have a link that waits start once its predecessor has ended, but not before `seconds`.

    Raises:
        SchedulerUnreachable: slurmctld does not answer.
    """
    _update(job, f"StartTime=now+{max(1, round(seconds))}")


def _update(job: str, change: str) -> None:
    # refused for a job that has started or ended meanwhile: nothing is left to put off
    with contextlib.suppress(CommandRefused):
        call(["scontrol", "update", f"jobid={job}", change])


def _name(run_id: str) -> str:
    return f"fedllm-{run_id}-coordinator"


def _submit(
    paths: RunPaths,
    config: Config,
    run_id: str,
    script: str,
    *more: str,
    log: str,
    words: Sequence[str],
) -> str:
    with storage_errors(paths.all_logs):
        paths.all_logs.mkdir(parents=True, exist_ok=True)
    section = config.scheduler
    options = job_options(section.sbatch, "coordinator")
    flags = sbatch_flags(options, sbatch=section.sbatch, program="coordinator", defaults={})
    environment = clean_environment(configured=flags)
    environment["FEDLLM_PYTHON"] = section.python or shlex.quote(sys.executable)
    environment["FEDLLM_SETUP"] = "\n".join(section.setup)
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={_name(run_id)}",
        f"--comment=fedllm {script}: {run_id}",
        f"--output={paths.all_logs / log}",
        *(f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in flags.items()),
        *more,
        str(shipped(f"slurm/{script}.sbatch")),
        *words,
    ]
    try:
        # on a cluster of clusters: `id;cluster`
        return call(command, environment=environment).strip().partition(";")[0]
    except CommandRefused as error:
        if says_no_room(str(error)):
            raise SchedulerFull(f"sbatch: {error}") from error
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
