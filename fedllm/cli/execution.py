"""Wiring of a run: configuration, scheduler and, for the inline one, the compute side."""

import io
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from fedllm.cli.live_run import live_run
from fedllm.cli.options import configuration, default_run_dir, existing_run, say
from fedllm.cli.sources import check_sources_of, private_sources
from fedllm.config.models import Config
from fedllm.errors import ConfigError, LeaseError, UserError
from fedllm.methods.catalog import check_method, private_space
from fedllm.planning.classes import JobKind, job_options
from fedllm.reporting.plan.plan_text import flags_text
from fedllm.reporting.trackers.trackers import require_trackers
from fedllm.rounds.chaining import take_link, this_link
from fedllm.rounds.coordinate import advance_while_possible, coordinate
from fedllm.rounds.dispatch.in_flight import is_done
from fedllm.rounds.dispatch.preflight import check_jobs
from fedllm.rounds.opening import close_run, open_run, resumed_config
from fedllm.rounds.run import Run
from fedllm.scheduling import schedulers
from fedllm.scheduling.environment import TaskEnvironment, become_task
from fedllm.scheduling.inline import Execute
from fedllm.scheduling.schedulers import check_log_path
from fedllm.scheduling.seam import Scheduler, SubmissionUnknown
from fedllm.scheduling.slurm.coordinator_job import (
    check_coordinator,
    holder_is_gone,
    refuse_second_coordinator,
    submit_coordinator,
)
from fedllm.scheduling.slurm.sbatch_flags import refuse_reserved
from fedllm.scheduling.slurm.script import log_pattern
from fedllm.scheduling.traits import traits_of
from fedllm.storage.frozen_config import mended_run_record
from fedllm.storage.own_code import folders_of
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.permissions import group_number
from fedllm.storage.records import PreparedRecord, RunRecord
from fedllm.storage.trust.place import is_here
from fedllm.storage.trust.regular_files import append_regular


def start(
    config_file: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    *,
    take_over: bool = False,
    unattended: bool = False,
) -> Path:
    """Run a configuration to its end, or continue where it stopped; return the run directory."""
    config, root = configuration(config_file, overrides), run_dir or default_run_dir(config_file)
    with live_run(root) as say_line:
        return start_config(
            config,
            root,
            take_over=take_over,
            unattended=unattended,
            code_folders=folders_of(config_file),
            given=given_keys(config_file, root, overrides),
            say_line=say_line,
        )


def _mend(root: Path, say_line: Callable[[str], None]) -> None:
    """Make a damaged record of a run again from its copy, and say it."""
    paths = RunPaths(root=root.resolve())
    if mended_run_record(paths):
        say_line(f"{paths.run}: damaged or gone, made again from {paths.run_copy}")


def given_keys(
    config_or_run: Path, root: Path, overrides: Sequence[str], *, accept_changes: bool = False
) -> set[str] | None:
    """Return the keys that this user gives, not the run directory `root`; None: all of them."""
    from_run = (
        config_or_run.is_dir() or config_or_run.resolve() == RunPaths(root=root).config.resolve()
    )
    if accept_changes or not from_run:
        return None
    return {override.partition("=")[0].strip() for override in overrides}


def start_config(
    config: Config,
    root: Path,
    *,
    take_over: bool = False,
    unattended: bool = False,
    code_folders: Sequence[str] | None = None,
    say_line: Callable[[str], None] = say,
    given: Collection[str] | None = None,
) -> Path:
    """Run a validated configuration as `start` does.

    Args:
        config: the configuration.
        root: the run directory.
        take_over: the user knows that the present coordinator ended.
        unattended: no person started it.
        code_folders: where a method of one's own is looked for; None: the working directory.
        say_line: prints a line.
        given: the keys of the configuration that this user gave; None: all.
    """
    _mend(root, say_line)
    is_new = not root.exists() or (root.is_dir() and not any(root.iterdir()))
    run = open_for_coordination(
        root,
        config,
        take_over=take_over,
        unattended=unattended,
        code_folders=code_folders,
        say_line=say_line,
        given=given,
    )
    try:
        coordinate(run)
    except UserError as error:
        keep = isinstance(error, LeaseError | SubmissionUnknown)
        if not is_new or keep or run.paths.prepared.exists():
            raise
        # preparing failed: remove the run, and do not name its log, which is gone too
        shutil.rmtree(run.paths.root)
        raise type(error)(str(error).partition("; log ")[0]) from error
    return root


def resume(
    root: Path,
    overrides: Sequence[str] = (),
    *,
    take_over: bool = False,
    accept_changes: bool = False,
    unattended: bool = False,
) -> None:
    """Continue a run to its end."""
    _mend(root, say)
    existing_run(root)
    config = resumed_config(root, overrides)
    given = given_keys(root, root, overrides, accept_changes=accept_changes)
    with live_run(root) as say_line:
        run = open_for_coordination(
            root,
            config,
            take_over=take_over,
            unattended=unattended,
            given=given,
            say_line=say_line,
        )
        coordinate(run)


def submit(
    config_or_run: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    *,
    accept_changes: bool = False,
) -> tuple[Path, str]:
    """Submit the coordinator of a configuration or of a run; return the run directory and the job.

    Raises:
        ConfigError: its jobs do not run on Slurm; or options that sbatch refuses, or that only
            fedllm sets.
        RunDirectoryError: Slurm cannot take its path.
        LeaseError: a coordinator already waits or runs.
    """
    root, config = root_and_config(config_or_run, overrides, run_dir)
    require_cluster(config, "resume" if config_or_run.is_dir() else "run", config_or_run)
    paths = RunPaths(root=root.resolve())
    refuse_reserved(config.scheduler)
    log_pattern(paths.all_logs, "")
    record = RunRecord.find(paths.run)
    if record and is_here(record.place, paths.root):
        # before we take the lease: a link that starts meanwhile would find it taken
        refuse_second_coordinator(paths, record.run_id)
    check_coordinator(config.scheduler)
    given = given_keys(config_or_run, root, overrides, accept_changes=accept_changes)
    folders = folders_of(config_or_run)
    run = open_for_coordination(root, config, code_folders=folders, given=given)
    try:
        if not run.paths.prepared.exists():
            # the coordinator would find these problems too, but report them only in its log
            check_jobs(run.scheduler, run.config, run.paths)
    finally:
        close_run(run)
    return root, submit_coordinator(run.paths, config, run.record.run_id)


def require_cluster(config: Config, command: str, subject: Path) -> None:
    """Refuse to submit what does not run on Slurm.

    Args:
        config: the configuration.
        command: the command that runs it on this machine.
        subject: what that command takes.

    Raises:
        ConfigError: it names `scheduler.kind`.
    """
    if not traits_of(config).jobs_outlive_coordinator:
        raise ConfigError(
            f"scheduler.kind: got {config.scheduler.kind}, but `fedllm submit` is for Slurm; to "
            f"run it on this machine: fedllm {command} {shlex.quote(str(subject))}; for Slurm: "
            "scheduler.kind: slurm"
        )


def root_and_config(
    config_or_run: Path, overrides: Sequence[str], run_dir: Path | None
) -> tuple[Path, Config]:
    """Return the run directory and the configuration, from either of them."""
    if config_or_run.is_dir():
        _mend(config_or_run, say)
        existing_run(config_or_run)
        return config_or_run, resumed_config(config_or_run, overrides)
    return run_dir or default_run_dir(config_or_run), configuration(config_or_run, overrides)


def advance_run(config_or_run: Path, run_dir: Path | None) -> bool:
    """Take the steps of a run that are possible now; return whether it is done."""
    root, config = root_and_config(config_or_run, (), run_dir)
    if is_done(RunPaths(root=root.resolve()), config):
        return True
    folders = folders_of(config_or_run)
    given = given_keys(config_or_run, root, ())
    run = open_for_coordination(root, config, unattended=True, code_folders=folders, given=given)
    return advance_while_possible(run) is None


def advance_link(root: Path) -> bool:
    """Run one link of a chained coordinator; return whether the run is done."""
    _mend(root, say)
    paths = existing_run(root)
    config = resumed_config(root, ())
    chain = this_link(paths, config, say=say, wait=time.sleep)
    return take_link(chain, lambda: open_for_coordination(root, config, unattended=True, given=()))


def open_for_coordination(
    root: Path,
    config: Config,
    *,
    take_over: bool = False,
    unattended: bool = False,
    code_folders: Sequence[str] | None = None,
    given: Collection[str] | None = None,
    scheduler_of: Callable[[RunPaths, Config], Scheduler] | None = None,
    say_line: Callable[[str], None] = say,
) -> Run:
    """Open a run for coordination, with the configured scheduler or a shared one.

    A method of the user's own is looked for in the folders that the run names, then in
    `code_folders`, which are the run's and the working directory unless given.

    Raises:
        ConfigError: options of sbatch that only fedllm sets, or a method that is not there.
        UserError: base or data are not here, or this user may not read them.
        RunDirectoryError: it cannot be used, or Slurm cannot take its path.
    """
    check_before_run(config, root)
    prepared = PreparedRecord.glance(RunPaths(root=root.resolve()).prepared)
    check_sources_of(config, prepared)
    if prepared and config.storage.group and (warning := private_sources(prepared)):
        say_line(f"warning: {warning}")
    return open_run(
        root,
        config,
        make_scheduler=scheduler_of or make_scheduler,
        say=say_line,
        holder_is_gone=holder_is_gone,
        take_over=take_over,
        unattended=unattended,
        code_folders=folders_of(root) if code_folders is None else code_folders,
        given=given,
    )


def check_before_run(config: Config, root: Path) -> None:
    """Refuse what no run could start with, without a look at base, data or scheduler.

    Raises:
        ConfigError: options of sbatch that only fedllm sets, a method that is not there, one that
            is not for private clients, or a tracker that is not installed.
        RunDirectoryError: Slurm cannot take the path of the run directory.
    """
    check_method(config.method)
    private_space(config)
    require_trackers(config.reporting)
    refuse_reserved(config.scheduler)
    check_log_path(config, RunPaths(root=root.resolve()))
    if config.storage.group:
        group_number(config.storage.group)


def say_where(config: Config, kind: JobKind, command: str) -> None:
    """Say on stderr that a command computes on this host, and how a job of Slurm would do it.

    It is said where jobs run on a cluster and this process is in none: on a login node.
    """
    if not traits_of(config).jobs_outlive_coordinator or TaskEnvironment().job is not None:
        return
    options = job_options(config.scheduler.sbatch, kind)
    flags = flags_text(options) if options else ""
    words = " ".join(filter(None, ["srun", flags, command]))
    sys.stderr.write(f"computing on this host, {TaskEnvironment().node}; as a job: {words}\n")


def make_scheduler(paths: RunPaths, config: Config) -> Scheduler:
    """Return the configured scheduler."""
    return schedulers.make_scheduler(config, paths, compute_here())


def compute_here() -> Execute:
    """Return a function that runs a job's program in this process and logs its output.

    The compute side is imported on first use.
    """
    programs: list[Callable[[str, Sequence[str]], int]] = []

    def execute(program: str, argv: Sequence[str], task: str, log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            io.TextIOWrapper(append_regular(log), encoding="utf-8") as out,
            redirect_stdout(out),
            redirect_stderr(out),
        ):
            if not programs:
                programs.append(_programs())
            become_task(task, str(log))
            return programs[0](program, argv)

    return execute


def _programs() -> Callable[[str, Sequence[str]], int]:
    from fedllm.process.session import Session
    from fedllm.programs.entry_points import run

    session = Session()
    return lambda program, argv: run(program, argv, session=session)
