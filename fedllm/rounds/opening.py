"""Opening of a run directory: create a new run, or go on with an existing one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedllm.config.loading import (
    dump_config,
    override_config,
    read_config,
    result_fingerprint,
)
from fedllm.config.models import Config, is_own
from fedllm.errors import ConfigError, FedllmError, RunDirectoryError
from fedllm.rounds.dispatch.in_flight import is_done
from fedllm.rounds.identity import keep_or_take_identity, new_run_id
from fedllm.rounds.known_records import KnownRecords
from fedllm.rounds.run import Run
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.scheduling.seam import Scheduler
from fedllm.storage.frozen_config import (
    changes_of,
    keep_run_record,
    key_values,
    new_run_record,
    refuse_edits,
)
from fedllm.storage.lease import HolderIsGone, Lease, process_is_gone
from fedllm.storage.own_code import changed_modules, read_own_code, refuse_changed
from fedllm.storage.paths import RunPaths, backup_name
from fedllm.storage.publishing.permissions import share_with_group
from fedllm.storage.publishing.publish import make_folder, publish_bytes, storage_errors
from fedllm.storage.records import ChangeRecord, OwnCodeRecord, PreparedRecord, RunRecord
from fedllm.storage.trust.place import place_of
from fedllm.storage.trust.sealed_commands import (
    commands_of,
    other_signer,
    refuse_open_folder,
    require_accepted,
    seals_of,
)

# keys of another configuration that an error names
_NAMED_KEYS = 5

PACKAGES = ("fedllm", "torch", "transformers", "peft", "submitit", "datasets", "safetensors")


def open_run(
    root: Path,
    config: Config,
    *,
    make_scheduler: Callable[[RunPaths, Config], Scheduler],
    say: Callable[[str], None],
    holder_is_gone: HolderIsGone = process_is_gone,
    take_over: bool = False,
    unattended: bool = False,
    code_folders: Sequence[str] = (),
    given: Collection[str] | None = None,
) -> Run:
    """Open a run directory: take its lease and apply `config`.

    Args:
        root: the run directory.
        config: its configuration.
        make_scheduler: makes the scheduler of its jobs.
        say: prints a line.
        holder_is_gone: says whether the holder of a lease has ended.
        take_over: whether to take the lease from a holder that may not have ended.
        unattended: whether no person called.
        code_folders: where a method of the user's own is looked for, after the run's own folders.
        given: the keys that the caller gave, others come from the run directory; None: all.

    Raises:
        ConfigError: a method of the user's own is not found.
        RunDirectoryError: the directory is not a run, belongs to another configuration,
            `rounds` is smaller than in the run, the source of a method of the user's own is not
            what the run began with, anybody may write the directory, or it holds commands of
            somebody else.
        LeaseError: another coordinator holds it.
    """
    paths = RunPaths(root=root.resolve())
    if paths.run.exists():
        _refuse_other(paths, config)
    else:
        _refuse_foreign_folder(paths)
    own_code = _own_code(paths, config, code_folders)
    commands = commands_of(config, own_code)
    if paths.run.exists():
        known = RunRecord.read(paths.run)
        require_accepted(paths.root, known.run_id, known.seals, commands, given=given)
    if config.storage.group:
        share_with_group(paths.root, config.storage.group)
    with storage_errors(paths.root):
        make_folder(paths.root)
    refuse_open_folder(paths.root)
    _refuse_links(paths)
    lease = Lease.acquire(
        paths,
        job=TaskEnvironment().job,
        gone=holder_is_gone,
        take_over=take_over,
        unattended=unattended,
    )
    try:
        if paths.run.exists():
            record = RunRecord.read(paths.run)
            if warning := other_signer(paths, record):
                say(warning)
            record = keep_or_take_identity(paths, record, lease, say)
            seals = seals_of(record.run_id, commands)
            record = _reconcile(paths, config, lease, own_code, record, seals)
        else:
            record = _create(paths, config, own_code)
        scheduler = make_scheduler(paths, config)
    except BaseException:
        lease.release()
        raise
    return Run(
        paths=paths,
        config=config,
        record=record,
        lease=lease,
        scheduler=scheduler,
        say=say,
        known_records=KnownRecords(paths, config, record),
    )


def close_run(run: Run) -> None:
    """Close a run: end the scheduler's processes and release the lease."""
    try:
        run.scheduler.close()
    finally:
        try:
            run.lease.release()
        except FedllmError as error:
            # for example a full disk; the first error that it caused is the one to raise
            run.say(f"the lease was not released: {error}")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    installed: dict[str, str] = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def _own_code(paths: RunPaths, config: Config, folders: Sequence[str]) -> OwnCodeRecord | None:
    """Return the source of the method, if it is the user's own: what a run that began must keep."""
    if not is_own(config.method.name):
        return None
    run = RunRecord.find(paths.run)
    before = run.own_code if run else None
    if before is None:
        return read_own_code(config.method.name, folders)
    try:
        now = read_own_code(config.method.name, before.folders)
    except ConfigError:
        # the user's folder may have moved
        now = read_own_code(config.method.name, folders)
    if paths.round(1).cohort.exists():
        refuse_changed(paths, before, now)
    return now


def _create(paths: RunPaths, config: Config, own_code: OwnCodeRecord | None) -> RunRecord:
    run_id = new_run_id(result_fingerprint(config), paths.root)
    record = new_run_record(config, run_id=run_id, versions=versions(), own_code=own_code)
    seals = seals_of(run_id, commands_of(config, own_code))
    record = record.model_copy(update={"place": place_of(paths.root), "seals": seals})
    publish_bytes(paths.config, dump_config(config).encode())
    keep_run_record(paths, record)
    return record


def _refuse_foreign_folder(paths: RunPaths) -> None:
    if not paths.root.exists():
        return
    if not paths.root.is_dir():
        raise RunDirectoryError(f"{paths.root}: is a file; choose another --run-dir")
    expected = {paths.config.name, paths.leases.name, paths.root.joinpath("logs").name}
    foreign = [p.name for p in paths.root.iterdir() if p.name not in expected]
    foreign = [name for name in foreign if not name.startswith(".")]
    if foreign:
        raise RunDirectoryError(
            f"{paths.root}: not empty and not a run ({foreign[0]}); choose another --run-dir"
        )


def _refuse_links(paths: RunPaths) -> None:
    """Refuse folders that lead elsewhere: what the run writes would land there."""
    folders = [paths.leases, paths.rounds, paths.all_logs, paths.client_stores, paths.evaluations]
    for each in paths.existing_rounds():
        if not each.record.exists():
            folders += [each.root, each.updates, each.attempts, each.checkpoints]
            folders += [each.aggregate, each.evaluation.root]
    for folder in folders:
        if folder.is_symlink():
            raise RunDirectoryError(
                f"{folder}: is a symbolic link, need a folder of this run: put it back"
            )


def _accepted_values(paths: RunPaths, record: RunRecord) -> Mapping[str, Any]:
    """Return the values that the run accepted last; an earlier version kept `config.yaml` alone."""
    return record.config or key_values(read_config(paths.config))


def _refuse_other(paths: RunPaths, config: Config) -> None:
    record = RunRecord.read(paths.run)
    changes = changes_of(_accepted_values(paths, record), config)
    if paths.round(1).cohort.exists():
        frozen = [str(change) for change in changes if change.kind == "result"]
        if frozen:
            # an edit of the run's own file is put back there; another configuration is another run
            refuse_edits(paths, record, read_config(paths.config))
            raise RunDirectoryError(
                f"{paths.root}: a run of another configuration: {', '.join(frozen[:_NAMED_KEYS])}"
                f"{_more(len(frozen) - _NAMED_KEYS)}; these keys are frozen with the "
                "first round; start another run: fedllm run CONFIG --run-dir DIR"
            )
        refuse_edits(paths, record, config)
    for change in changes:
        if change.key == "rounds" and change.after < change.before:
            raise RunDirectoryError(
                f"{paths.root}: rounds can only grow, {change.before} in the run: got "
                f"{change.after}; to go on with it as it is: fedllm resume {paths.root}"
            )


def _more(keys: int) -> str:
    return f" and {keys} more" if keys > 0 else ""


def _reconcile(
    paths: RunPaths,
    config: Config,
    lease: Lease,
    own_code: OwnCodeRecord | None,
    record: RunRecord,
    seals: dict[str, str],
) -> RunRecord:
    changes = changes_of(_accepted_values(paths, record), config)
    fingerprint, values = result_fingerprint(config), key_values(config)
    if (
        any(change.key in {"model.path", "data.path"} for change in changes)
        or fingerprint != record.result_fingerprint
        or changed_modules(record.own_code, own_code)
        or _is_purged(paths, config)
    ):
        _prepare_again(paths)
    content = dump_config(config).encode()
    if not paths.config.is_file() or paths.config.read_bytes() != content:
        # before run.json: if killed in between, the next start records the change
        publish_bytes(paths.config, content)
    update: dict[str, Any] = {
        "result_fingerprint": fingerprint,
        "config": values,
        "own_code": own_code,
        "seals": seals,
    }
    if record.model_copy(update=update) == RunRecord.read(paths.run):
        if RunRecord.glance(paths.run_copy) != record:
            record.publish(paths.run_copy)
        return record
    recorded = [
        ChangeRecord(key=each.key, before=each.before, after=each.after, lease=lease.number)
        for each in changes
    ]
    if record.own_code != own_code:
        was, now = (code.model_dump() if code else None for code in (record.own_code, own_code))
        recorded.append(ChangeRecord(key="own_code", before=was, after=now, lease=lease.number))
    update["changes"] = [*record.changes, *recorded]
    after = record.model_copy(update=update)
    keep_run_record(paths, after)
    return after


def _is_purged(paths: RunPaths, config: Config) -> bool:
    """Return whether a run has more to do and its prepared data or base are gone."""
    prepared = PreparedRecord.find(paths.prepared)
    if prepared is None or is_done(paths, config):
        return False
    return not all(Path(path).exists() for path in (prepared.data_path, prepared.model_path))


def _prepare_again(paths: RunPaths) -> None:
    """Set the preparation aside; before the first round also the state of round 0 made from it."""
    for path in (paths.prepared, paths.prepare_attempts):
        if path.exists():
            path.rename(backup_name(path, "replaced"))
    start = paths.round(0).root
    if start.exists() and not paths.round(1).cohort.exists():
        start.rename(backup_name(start, "replaced"))


def resumed_config(root: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration of a run with some execution keys, or `rounds`, changed."""
    return override_config(read_config(RunPaths(root=root).config), overrides)
