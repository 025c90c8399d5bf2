"""The coordinator as a Slurm job: one job that requeues itself, or a chain of short jobs."""

import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedllm.config.models import Config, SchedulerSection
from fedllm.errors import ConfigError, LeaseError, UserError
from fedllm.planning.classes import job_options
from fedllm.planning.option_spelling import by_flag
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.scheduling.seam import (
    Option,
    SchedulerFull,
    SchedulerUnreachable,
    SubmissionUnknown,
    TaskState,
)
from fedllm.scheduling.slurm.check import job_problems
from fedllm.scheduling.slurm.command_output import submitted_job
from fedllm.scheduling.slurm.commands import (
    CommandRefused,
    InstalledCommands,
    call,
    clean_environment,
    unknown_submission,
)
from fedllm.scheduling.slurm.free_capacity import Surveyor
from fedllm.scheduling.slurm.notation import arrays_of
from fedllm.scheduling.slurm.sbatch_flags import (
    Flags,
    refusal,
    says_no_room,
    sbatch_flags,
    words_of,
)
from fedllm.scheduling.slurm.script import fedllm_variables, log_pattern, python_words
from fedllm.scheduling.slurm.squeue import QUEUE_COLUMNS, cancel, read_answer, states_by_id
from fedllm.storage.lease import process_is_gone
from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.publishing.publish import publish_bytes, storage_errors
from fedllm.storage.records import CoordinatorJobRecord, DoubtRecord, LeaseRecord
from fedllm.storage.trust.owners import user_name

_SCRIPTS = {"resident": "slurm/coordinator.sbatch", "chained": "slurm/chain.sbatch"}
_OPTION = re.compile(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class LinkStart:
    """When a link of the chain starts: after its `dependency`, and not before some seconds."""

    dependency: str
    seconds: int = 0

    def options(self) -> list[str]:
        """Return the options of sbatch."""
        begin = [f"--begin=now+{self.seconds}"] if self.seconds else []
        return [f"--dependency={self.dependency}", *begin]

    def change(self) -> str:
        """Return the change for `scontrol update` of a link that waits for its predecessor."""
        return f"StartTime=now+{self.seconds}" if self.seconds else f"dependency={self.dependency}"


def after_all(jobs: Sequence[str]) -> str:
    """Return the dependency of a link that starts after all jobs have ended."""
    return f"afterany:{':'.join(jobs)},singleton"


def after_any(arrays: Sequence[str], *, minutes_after: tuple[str, int]) -> str:
    """Return the dependency of a link that starts after an array, or minutes after a job began."""
    # no `singleton`: with `?` any one condition is enough, and it would be one of them
    other, minutes = minutes_after
    return "?".join([*(f"afterany:{array}" for array in arrays), f"after:{other}+{minutes}"])


def coordinator_flags(section: SchedulerSection) -> Flags:
    """Return the options of the coordinator's job; configured ones replace those of its script.

    Raises:
        ConfigError: an option that fedllm sets itself.
    """
    written = shipped(_SCRIPTS[section.coordinator]).read_text(encoding="utf-8")
    own = {name: value or True for name, value in _OPTION.findall(written)}
    defaults = {name: own[name] for name in ("time", "requeue", "signal") if name in own}
    return _flags(section, defaults)


def check_coordinator(section: SchedulerSection) -> None:
    """Refuse a coordinator's job that Slurm would refuse, or accept and never start.

    Raises:
        ConfigError: one line per problem, each names its key.
        SchedulerUnreachable: slurmctld does not answer.
    """

    def test(words: Sequence[str], flags: Flags) -> None:
        call(words, environment=clean_environment(configured=flags))

    flags = coordinator_flags(section)
    surveyor = Surveyor(commands=InstalledCommands(), query_seconds=section.query_seconds)
    lines = job_problems(
        flags, section=section, program="coordinator", survey=surveyor.survey(flags), test=test
    )
    if message := "\n".join(lines):
        raise ConfigError(message)


def submit_coordinator(paths: RunPaths, config: Config, run_id: str) -> str:
    """Submit the coordinator's job, of the kind that `scheduler.coordinator` says; return its id.

    The job has the options of `scheduler.sbatch.coordinator`. It reads `config.yaml` of the run
    directory, which must exist, and writes its log beside the rounds.

    Raises:
        LeaseError: such a job already waits or runs.
        ConfigError: sbatch refuses an option; the message names its key.
        SchedulerFull: limits on submitted jobs leave no room now.
        SchedulerUnreachable: slurmctld does not answer.
        SubmissionUnknown: neither sbatch's answer nor the queue shows the job.
    """
    refuse_second_coordinator(paths, run_id)
    if config.scheduler.coordinator == "chained":
        return submit_link(paths, config, run_id)
    words = [str(paths.config), "--run-dir", str(paths.root)]
    job = _submit(paths, config, run_id, "coordinator", log="coordinator-%j.log", words=words)
    record_coordinator(paths, job, "resident")
    return job


def submit_sweep_coordinator(paths: RunPaths, config: Config, sweep_id: str) -> str:
    """Submit one job that coordinates all runs of a sweep; return its id.

    The errors are those of `submit_coordinator`.

    Args:
        paths: the sweep's folder, which has the coordinator's files of a run directory.
        config: the configuration of one of its runs, which says how the job is submitted.
        sweep_id: the sweep's id.
    """
    if config.scheduler.coordinator == "chained":
        raise ConfigError(
            "scheduler.coordinator: got chained, but one resident job coordinates the runs of a "
            "sweep; need resident"
        )
    refuse_second_coordinator(paths, sweep_id)
    words = [str(paths.root)]
    job = _submit(
        paths,
        config,
        sweep_id,
        "coordinator",
        log="coordinator-%j.log",
        words=words,
        command="resume",
    )
    record_coordinator(paths, job, "resident")
    return job


def submit_link(
    paths: RunPaths, config: Config, run_id: str, *, start: LinkStart | None = None, lost: int = 0
) -> str:
    """Submit a link of the chain; return its id.

    Raises:
        ConfigError: sbatch refuses an option; the message names its key.
        SchedulerFull: limits on submitted jobs leave no room now.
        SchedulerUnreachable: slurmctld does not answer.
    """
    options = start.options() if start else []
    job = _submit(
        paths, config, run_id, "chain", *options, log="chain.log", words=[str(paths.root)]
    )
    record_coordinator(paths, job, "chained", lost=lost)
    return job


def record_coordinator(
    paths: RunPaths, job: str, mode: Literal["resident", "chained"], *, lost: int = 0
) -> None:
    """Record the job that coordinates a run, submitted by this user."""
    record = CoordinatorJobRecord(job=job, mode=mode, lost=lost, user=os.geteuid())
    record.publish(paths.coordinator_job)


def refuse_second_coordinator(paths: RunPaths, run_id: str) -> None:
    """Refuse a second coordinator's job.

    Raises:
        LeaseError: one already waits or runs.
        SchedulerUnreachable: slurmctld does not answer now.
        SubmissionUnknown: one may exist that the queue here does not show.
    """
    if jobs := list(coordinator_jobs(run_id)):
        raise LeaseError(
            f"{paths.root}: its coordinator waits or runs as Slurm job {', '.join(jobs)}; wait "
            f"for it, or end it with: fedllm cancel {paths.root}"
        )
    if doubt := DoubtRecord.find(paths.coordinator_in_doubt):
        raise SubmissionUnknown(doubt.said).kept_in(paths.coordinator_in_doubt)
    last = CoordinatorJobRecord.find(paths.coordinator_job)
    if last and last.user not in {None, os.geteuid()} and job_is_gone(last.job, last.user) is None:
        raise LeaseError(
            f"{paths.root}: its coordinator was submitted as Slurm job {last.job} by "
            f"{user_name(last.user)}, and Slurm does not say here whether it ended (it may hide "
            f"jobs of other users); if it did, remove {paths.coordinator_job}"
        )


def coordinator_jobs(run_id: str) -> dict[str, TaskState]:
    """Return the coordinator's jobs that wait or run, the oldest first.

    Raises:
        SchedulerUnreachable: slurmctld does not answer now.
    """
    # the second name is that of earlier versions
    names = f"{_name(run_id)},fedllm-{run_id}-coordinator"
    words = ["squeue", "--noheader", f"--name={names}"]
    try:
        states = read_answer(call([*words, "-o", QUEUE_COLUMNS])).states
    except CommandRefused as error:
        raise SchedulerUnreachable(f"squeue: {error}") from error
    return {job: states[job] for job in sorted(states, key=lambda job: int(arrays_of([job])[0]))}


def start_link(job: str, start: LinkStart) -> bool:
    """Change when a waiting link starts; return False if Slurm refuses and the link still waits.

    Raises:
        SchedulerUnreachable: slurmctld does not answer.
    """
    try:
        call(["scontrol", "update", f"jobid={job}", start.change()])
    except CommandRefused:
        # it may have started or ended meanwhile: then no delay is needed
        return states_by_id([job], InstalledCommands()).states[job] is not TaskState.WAITING
    return True


def _name(run_id: str) -> str:
    return f"coordinator-fedllm-{run_id}"


def _submit(
    paths: RunPaths,
    config: Config,
    run_id: str,
    script: str,
    *more: str,
    log: str,
    words: Sequence[str],
    command: str = "run",
) -> str:
    with storage_errors(paths.all_logs):
        paths.all_logs.mkdir(parents=True, exist_ok=True)
    section = config.scheduler
    flags = _flags(section, {})
    file = paths.all_logs / f"{script}.sbatch"
    publish_bytes(file, coordinator_script(script, section, command).encode())
    submission = [
        "sbatch",
        "--parsable",
        f"--job-name={_name(run_id)}",
        f"--comment=fedllm {script}: {run_id}",
        f"--output={log_pattern(paths.all_logs, log)}",
        *words_of(flags),
        *more,
        str(file),
        *words,
    ]
    before = coordinator_jobs(run_id)
    try:
        output = call(submission, environment=clean_environment(configured=flags))
    except CommandRefused as error:
        if says_no_room(str(error)):
            raise SchedulerFull(f"sbatch: {error}") from error
        # a plugin or wrapper may fail after Slurm took the job
        if jobs := _new_jobs(run_id, before):
            return jobs[-1]
        raise refusal(str(error), flags, sbatch=section.sbatch, program="coordinator") from error
    answer = submitted_job(output)
    return (
        _find_submitted(paths, run_id, before, output)
        if answer is None or answer.cluster
        else answer.job
    )


def _flags(section: SchedulerSection, defaults: Mapping[str, Option]) -> Flags:
    options = job_options(section.sbatch, "coordinator")
    own = by_flag(section.sbatch.coordinator)
    if "signal" not in own:
        # the signal of `default` is for workers; the coordinator's goes to its batch script
        options = {key: value for key, value in options.items() if key != "signal"}
    return sbatch_flags(options, sbatch=section.sbatch, program="coordinator", defaults=defaults)


def coordinator_script(name: str, section: SchedulerSection, command: str = "run") -> str:
    """Return a coordinator's script with the exports it needs, whatever `--export` says.

    `command` is the one of fedllm that it runs.
    """
    lines = shipped(f"slurm/{name}.sbatch").read_text(encoding="utf-8").splitlines(keepends=True)
    variables = {
        **fedllm_variables(),
        "FEDLLM_PYTHON": python_words(section),
        "FEDLLM_SETUP": "\n".join(section.setup),
        "FEDLLM_COMMAND": command,
    }
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    exports = [f"export {key}={shlex.quote(value)}\n" for key, value in sorted(variables.items())]
    return "".join([*lines[: last + 1], "\n", *exports, *lines[last + 1 :]])


def _new_jobs(run_id: str, before: Collection[str]) -> list[str]:
    """Return the coordinator's jobs in the queue that were not there before, oldest first."""
    own = TaskEnvironment().job
    return [job for job in coordinator_jobs(run_id) if job != own and job not in before]


def _find_submitted(paths: RunPaths, run_id: str, before: Collection[str], output: str) -> str:
    """Return the coordinator's job that was just submitted, by its name in the queue."""
    jobs = _new_jobs(run_id, before)
    if not jobs:
        unknown = SubmissionUnknown(unknown_submission(_name(run_id), output))
        DoubtRecord(name=_name(run_id), said=str(unknown)).publish(paths.coordinator_in_doubt)
        raise unknown.kept_in(paths.coordinator_in_doubt)
    return jobs[-1]


def job_is_gone(job: str, user: int | None = None) -> bool | None:
    """Say whether a job of any user neither waits nor runs; None: this host cannot tell.

    `user` is the number of the user who submitted it; None: it is not known.
    """
    users = {} if user is None else {job: user}
    try:
        state = states_by_id([job], InstalledCommands(), users).states[job]
    except UserError:
        return None
    return {TaskState.GONE: True, TaskState.UNKNOWN: None}.get(state, False)


def holder_is_gone(holder: LeaseRecord) -> bool | None:
    """Say whether the coordinator that holds a lease has ended; None: this host cannot tell.

    Slurm knows about its job, this machine about its process. A holder with the id of our own job
    is an earlier start of this requeued job, unless its process still runs.
    """
    if holder.slurm_job is None:
        return process_is_gone(holder)
    if holder.slurm_job == TaskEnvironment().job:
        return process_is_gone(holder) is not False
    return job_is_gone(holder.slurm_job, holder.user)


def cancel_job(job: str) -> None:
    """End a coordinator's job; a job that is gone is ignored.

    Raises:
        CancelRefused: it is another user's.
        SchedulerUnreachable: slurmctld does not answer now.
    """
    cancel([job], InstalledCommands())
