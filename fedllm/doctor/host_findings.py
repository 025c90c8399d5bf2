"""Findings about this host: folders, their group, and whether a run could start offline."""

import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from fedllm.config.loading import read_config
from fedllm.config.models import Config, StorageSection
from fedllm.doctor.findings import Finding
from fedllm.doctor.trials import file_system, nearest_folder, trial_folder, try_folder
from fedllm.errors import ConfigError, FedllmError
from fedllm.planning.federation import plan_federation
from fedllm.reporting.results.summary import update_bytes
from fedllm.reporting.tables import size
from fedllm.scheduling.traits import cache_for
from fedllm.storage.hub import hub_key, is_hub_name
from fedllm.storage.paths import RunPaths, cache_of
from fedllm.storage.publishing.permissions import group_number
from fedllm.storage.records import PreparedRecord

_LOCAL_KINDS = {"tmpfs", "ramfs", "overlay", "devtmpfs"}
_USUALLY_LOCAL = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm", "/run")))
_EMBEDDED = "embedded"
# space needed over the updates of one round: also for states and unfinished copies
_SPACE_FACTOR = 3


def folder_findings(
    root: Path, storage: StorageSection, *, on_cluster: bool, seen_from: Collection[str] = ()
) -> Iterator[Finding]:
    """Yield findings about the folders of runs and of the cache, by writing to them.

    Args:
        root: the run directory, which need not exist.
        storage: the configuration of cache and group.
        on_cluster: whether other machines have to see the folders.
        seen_from: hosts whose probes saw them.
    """
    parents = {nearest_folder(root): "runs"}
    cache = nearest_folder(cache_of(storage.cache, root, beside_runs=on_cluster).root)
    parents[cache] = f"{parents[cache]} and cache" if cache in parents else "cache"
    for parent, name in parents.items():
        yield _writability(f"storage of {name}", parent)
        if on_cluster:
            yield _visibility(f"place of {name}", parent, seen_from)
    yield _free_space(root)
    yield _group(nearest_folder(root), storage.group)


def _writability(check: str, parent: Path) -> Finding:
    try:
        with trial_folder(parent) as folder:
            seconds = try_folder(folder)
    except FedllmError as error:
        change = "--run-dir or storage.cache: another directory"
        return Finding(check=check, level="fail", found=str(error), change=change)
    kind = file_system(parent) or "unknown file system"
    found = f"{parent} ({kind}): rename, hard links and fsync hold, {1000 * seconds:.1f} ms a file"
    return Finding(check=check, level="ok", found=found)


def _visibility(check: str, parent: Path, seen_from: Collection[str]) -> Finding:
    others = sorted(set(seen_from) - {os.uname().nodename})
    if others:
        return Finding(check=check, level="ok", found=f"{parent}: seen from {', '.join(others)}")
    kind, real = file_system(parent), parent.resolve()
    local = kind in _LOCAL_KINDS
    if local or any(real.is_relative_to(folder) for folder in _USUALLY_LOCAL):
        change = "--run-dir and storage.cache: a directory that all compute nodes share"
        found = f"{parent} ({kind}) is this machine's own on most clusters"
        return Finding(check=check, level="warn", found=found, change=change)
    if seen_from:
        found = f"{parent}: seen by a node on this machine; no other machine was checked"
        return Finding(check=check, level="ok", found=found)
    return Finding(check=check, level="not done", found=f"{parent}: no compute node looked at it")


def _free_space(root: Path) -> Finding:
    parent = nearest_folder(root)
    free = shutil.disk_usage(parent).free
    prepared = _prepared(root)
    found = f"{size(free)} free in {parent}"
    if prepared is None:
        found += "; what a round writes is known once CONFIG is prepared"
        return Finding(check="free space", level="ok" if free > 2**30 else "warn", found=found)
    config, record = prepared
    federation = plan_federation(config, record)
    cohort = federation.cohort(1)
    updates = sum(
        update_bytes(federation.ranks[client.tier], record.modules, record.sent)
        for client in cohort
    )
    found += f"; a round publishes updates of {size(updates)}"
    if free < _SPACE_FACTOR * updates:
        change = "make space, choose another --run-dir, or lower storage.keep_states"
        return Finding(check="free space", level="fail", found=found, change=change)
    return Finding(check="free space", level="ok", found=found)


def _prepared(root: Path) -> tuple[Config, PreparedRecord] | None:
    paths = RunPaths(root=root)
    record = PreparedRecord.find(paths.prepared)
    return (read_config(paths.config), record) if record else None


def _group(parent: Path, group: str | None) -> Finding:
    check = "group"
    if group is None:
        found = "storage.group is not set: runs are yours alone, or as your umask says"
        return Finding(check=check, level="not done", found=found)
    try:
        number = group_number(group)
    except ConfigError as error:
        change = "storage.group: a group that `id` lists"
        return Finding(check=check, level="fail", found=str(error), change=change)
    there = parent.stat()
    if there.st_gid == number and there.st_mode & stat.S_ISGID:
        found = f"{parent} belongs to {group} and hands it on"
        return Finding(check=check, level="ok", found=found)
    found = f"you are in {group}; run directories are given to it when they are made"
    if not there.st_mode & stat.S_IXGRP or (there.st_gid != number and not there.st_mode & 0o001):
        change = f"chgrp {group} {parent} && chmod g+rxs {parent}"
        found = f"{parent} is closed to {group}: it could not reach the runs in it"
        return Finding(check=check, level="warn", found=found, change=change)
    return Finding(check=check, level="ok", found=found)


def readiness_findings(config: Config, root: Path) -> Iterator[Finding]:
    """Yield whether base and data are here, and whether a run would need the network."""
    cache = cache_for(config, root)
    prepared = _prepared(root)
    if prepared is not None:
        record = prepared[1]
        gone = [path for path in (record.model_path, record.data_path) if not Path(path).exists()]
        if gone:
            lost, change = f"{', '.join(gone)} is gone", "prepare again: fedllm prepare CONFIG"
            yield Finding(check="prepared", level="fail", found=lost, change=change)
        else:
            ready = f"{root} is prepared: nothing needs the network"
            yield Finding(check="prepared", level="ok", found=ready)
        return
    sections = (
        ("model.path", config.model.path, config.model.revision, cache.model),
        ("data.path", config.data.path, config.data.revision, cache.data),
    )
    for key, path, revision, place in sections:
        yield _source_finding(key, path, place(hub_key(path, revision)))


def _source_finding(key: str, path: str, fetched: Path) -> Finding:
    if path == _EMBEDDED:
        return Finding(check=key, level="ok", found="embedded: made by prepare, without a network")
    if Path(path).expanduser().exists():
        return Finding(check=key, level="ok", found=f"{path} is here")
    if fetched.is_dir():
        return Finding(check=key, level="ok", found=f"{path} was fetched to {fetched}")
    if is_hub_name(path):
        change = "fetch it where the network is: fedllm prepare CONFIG"
        found = f"{path} is not here; as a name of the Hugging Face hub it needs the network"
        return Finding(check=key, level="warn", found=found, change=change)
    change = f"{key}: a path that is there, or a name of the hub"
    return Finding(
        check=key, level="fail", found=f"{path}: no such file or directory", change=change
    )
