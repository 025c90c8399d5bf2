"""Wiring of a sweep: its file, its folder, and the schedulers that its runs share."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.cli import execution
from fedllm.cli.options import configuration_file, default_run_dir, relative_paths, say_of_run
from fedllm.config.loading import load_changed, result_fingerprint, validate
from fedllm.config.models import Config, is_own
from fedllm.config.sweep_files import Changes, SweepFile, load_sweep
from fedllm.errors import ConfigError, RunDirectoryError
from fedllm.methods.catalog import check_method, private_space
from fedllm.planning.sweeps.sweep_runs import SweepRun, expand
from fedllm.rounds.run import Run
from fedllm.rounds.sweeping import Sweep, drive
from fedllm.scheduling.schedulers import make_scheduler
from fedllm.scheduling.shared_scheduler import SchedulerPool
from fedllm.scheduling.slurm.coordinator_job import check_coordinator, submit_sweep_coordinator
from fedllm.scheduling.slurm.sbatch_flags import refuse_reserved
from fedllm.scheduling.traits import cache_for, traits_of
from fedllm.storage.own_code import folders_of, read_own_code
from fedllm.storage.paths import SweepPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.sweep_records import SweepRecord, SweepRunRecord
from fedllm.storage.trust.sealed_commands import OWN_CODE, commands_of, require_accepted, seals_of

_SEALED = "sweep"


def default_sweep_dir(file: Path) -> Path:
    """Return `runs/<name of the sweep>`, where its runs share the cache of other runs."""
    return default_run_dir(file)


def planned_sweep(path: Path, root: Path) -> tuple[SweepFile, list[SweepRun]]:
    """Read a sweep's file and return its runs, whose cache is beside the sweep's folder.

    Raises:
        ConfigError: one line per problem.
    """
    file = load_sweep(path)
    base = configuration_file(file.base)
    if not base.is_file():
        raise ConfigError(
            f"{path}: base: {file.keys.base}: no such configuration file; give a path as seen from "
            "the sweep's file"
        )

    def load(changes: Changes) -> Config:
        config = load_changed(base, changes)
        if is_own(config.method.name):
            read_own_code(config.method.name, folders_of(base))
        check_method(config.method)
        private_space(config)
        refuse_reserved(config.scheduler)
        cache = str(cache_for(config, root).root)
        storage = config.storage.model_copy(update={"cache": cache})
        return config.model_copy(update={"storage": storage})

    return file, expand(file, load)


def create_sweep(path: Path, root: Path) -> SweepPaths:
    """Make the folder of a sweep, or compare an existing one with the file; return its paths.

    Arms and seeds may be added, and execution keys may change.

    Raises:
        ConfigError: one line per problem of the file.
        RunDirectoryError: the folder holds something else, or a run with another result.
    """
    file, runs = planned_sweep(path, root)
    paths = SweepPaths(root=root.resolve())
    keys = file.keys
    record = SweepRecord(
        code_folders=folders_of(configuration_file(file.base)),
        runs=[_record_of(run) for run in runs],
        comparison=keys.comparison.model_dump(mode="json"),
        noise_of=keys.noise_floor.arm if keys.noise_floor else None,
        max_parallel=keys.max_parallel,
    )
    before = SweepRecord.find(paths.record)
    sweep_id = before.sweep_id if before else ""
    record = record.model_copy(update={"sweep_id": sweep_id or uuid.uuid4().hex[:8]})
    if before is not None:
        _refuse_other(paths, before, record)
    elif root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RunDirectoryError(f"{root}: not empty and not a sweep; choose another --out")
    publish_bytes(paths.file, path.read_bytes())
    record = record.model_copy(update={"seals": seals_of(_SEALED, _commands(record))})
    record.publish(paths.record)
    return paths


def _commands(record: SweepRecord) -> dict[str, list[Any]]:
    """Return the keys that hold commands, with their distinct values in all runs."""
    found: dict[str, list[Any]] = {}
    for run in record.runs:
        config = validate(run.config)
        own = {OWN_CODE: [config.method.name, record.code_folders]}
        commands = commands_of(config, None) | (own if is_own(config.method.name) else {})
        for key, value in commands.items():
            if value not in (values := found.setdefault(key, [])):
                values.append(value)
    return found


def _record_of(run: SweepRun) -> SweepRunRecord:
    config = run.config.model_dump(mode="json")
    return SweepRunRecord(name=run.name, arm=run.arm, phase=run.phase, config=config, rate=run.rate)


def _refuse_other(paths: SweepPaths, before: SweepRecord, now: SweepRecord) -> None:
    """Refuse a file whose runs are not those of the folder.

    Raises:
        RunDirectoryError: it names the first run that differs.
    """
    planned = {run.name: run for run in now.runs}
    for run in before.runs:
        same = planned.get(run.name)
        if same is None or _identity(same) != _identity(run):
            what = "is missing in the file" if same is None else "has other keys in the file"
            raise RunDirectoryError(
                f"{paths.root}: the sweep was made from another file: {run.name} {what}; choose "
                f"another --out, or go on with: fedllm resume {paths.root}"
            )


def _identity(run: SweepRunRecord) -> tuple[str, int]:
    config = validate(run.config)
    return result_fingerprint(config), config.rounds


def existing_sweep(root: Path) -> SweepPaths | None:
    """Return the paths of a sweep, or None if the folder is none."""
    paths = SweepPaths(root=root.resolve())
    return paths if paths.record.exists() else None


def submit_sweep(paths: SweepPaths, *, accept_changes: bool = False) -> str:
    """Submit one job that takes all runs of a sweep to their end; return its id.

    Raises:
        ConfigError: options that sbatch refuses, or that only fedllm sets.
        LeaseError: such a job already waits or runs.
        RunDirectoryError: the sweep holds commands that this user neither gave nor accepted.
    """
    record = _accepted(paths, accept_changes=accept_changes)
    config = validate(record.runs[0].config)
    execution.require_cluster(config, "resume", paths.root)
    execution.check_before_run(config, paths.root)
    check_coordinator(config.scheduler)
    return submit_sweep_coordinator(paths.coordination, config, record.sweep_id)


def drive_sweep(
    paths: SweepPaths,
    *,
    take_over: bool = False,
    accept_changes: bool = False,
    unattended: bool = False,
) -> None:
    """Take all runs of a sweep to their end; its errors are those of `rounds.sweeping.drive`.

    Raises:
        RunDirectoryError: the sweep holds commands that this user neither gave nor accepted.
    """
    record = _accepted(paths, accept_changes=accept_changes)
    execute = execution.compute_here()
    pool = SchedulerPool(
        make=lambda config: make_scheduler(config, paths.coordination, execute),
        max_parallel=_throttle(record),
    )

    def open_one(root: Path, config: Config, say_line: Callable[[str], None]) -> Run:
        return execution.open_for_coordination(
            root,
            config,
            take_over=take_over,
            unattended=unattended,
            code_folders=record.code_folders,
            scheduler_of=lambda _paths, config: pool.scheduler(config),
            say_line=say_line,
        )

    drive(
        Sweep(
            paths=paths,
            record=record,
            open_run=open_one,
            end_workers=pool.close,
            say=lambda line: say_of_run(relative_paths(line)),
        )
    )


def _accepted(paths: SweepPaths, *, accept_changes: bool) -> SweepRecord:
    """Return the record, once this user gave or accepted the commands in it."""
    record = SweepRecord.read(paths.record)
    commands = _commands(record)
    if not accept_changes:
        require_accepted(paths.root, _SEALED, record.seals, commands)
    seals = seals_of(_SEALED, commands)
    sweep_id = record.sweep_id or uuid.uuid4().hex[:8]  # one of an earlier version has none
    if (record.seals, record.sweep_id) != (seals, sweep_id):
        record = record.model_copy(update={"seals": seals, "sweep_id": sweep_id})
        record.publish(paths.record)
    return record


def _throttle(record: SweepRecord) -> int | None:
    """Return the number of tasks of all runs that may be queued; None: nothing is queued."""
    config = validate(record.runs[0].config)
    if not traits_of(config).jobs_outlive_coordinator:
        return None
    return record.max_parallel or config.scheduler.max_parallel
