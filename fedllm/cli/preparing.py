"""Preparation for a plan: found in the cache, or made and kept there.

The key of a kept preparation holds everything that decides the result, files by their version
(inode, size, time of change). So it is for plans only: a run prepares by content.
"""

import contextlib
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fedllm.cli.sources import check_sources
from fedllm.config.models import Config, is_own
from fedllm.errors import UserError
from fedllm.process.log import say
from fedllm.storage.fingerprints import fingerprint_values
from fedllm.storage.kept_records import Count
from fedllm.storage.paths import CachePaths, package_folder
from fedllm.storage.publishing.folders import publishing_folder
from fedllm.storage.publishing.publish import Version, version_of
from fedllm.storage.records import PreparedRecord, Record

# keys that no preparation reads, and that people vary from plan to plan
_UNREAD: dict[str, bool | set[str]] = {
    "rounds": True,
    "clients": {"cohort", "quorum"},
    "training": {"max_steps", "learning_rate"},
}
# a megabyte each at thousands of clients
_KEPT = 50


class PreparationRecord(Record):
    """The result of a preparation, and the lines that it said to the user."""

    prepared: PreparedRecord
    lines: list[str]


def prepared_once(
    config: Config, cache: CachePaths, count: Count, tell: Callable[[str], None] = say
) -> PreparedRecord:
    """Return the kept preparation of a configuration and its files, or prepare it."""
    found = PreparationRecord.glance(cache.preparation(_key(config)))
    if found is None:
        return prepared_anew(config, cache, count, tell)
    for line in found.lines:
        tell(line)
    return found.prepared


def prepared_anew(
    config: Config, cache: CachePaths, count: Count, tell: Callable[[str], None] = say
) -> PreparedRecord:
    """Prepare a configuration, and keep the result for its next plan."""
    check_sources(config)
    # imported late: the compute side takes seconds to load
    from fedllm.programs.prepare import prepare

    kept = cache.preparation(_key(config))
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        tell(line)

    prepared = prepare(config, cache, report, count)
    # a method of the user's own may be made of any files
    if not is_own(config.method.name):
        _keep(PreparationRecord(prepared=prepared, lines=lines), kept, cache.preparations)
    return prepared


def _keep(found: PreparationRecord, file: Path, preparations: Path) -> None:
    """Keep a preparation; only who may read its clients' rows may read it."""
    rows = Path(found.prepared.data_path)
    # a cache that takes no more files serves as it is
    with contextlib.suppress(UserError):
        with publishing_folder(file.parent, sources=sorted(rows.iterdir())) as beside:
            (beside / file.name).write_bytes(found.to_bytes())
        _drop_oldest(preparations)


def _drop_oldest(folder: Path) -> None:
    kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in kept[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def _key(config: Config) -> str:
    """Return the fingerprint of everything that decides a preparation."""
    held_out = config.clients.held_out_from
    named = [config.model.path, config.model.adapter, config.data.path, held_out]
    return fingerprint_values(
        config.model_dump(mode="json", exclude=_UNREAD),
        _versions([Path(name).expanduser() for name in named if isinstance(name, str)]),
        # packages, this code, and what a processor or GPU can compute
        [v for v in _versions([package_folder()]) if v[0].endswith(".py")],
        version_of(Path(sysconfig.get_path("purelib"))),
        [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")],
    )


def _versions(paths: Iterable[Path]) -> list[tuple[str, Version]]:
    """Return the version of every file and folder at and below `paths`; of none, if none is there.

    The version of a folder changes when a file is added or removed.
    """
    found = []
    for path in paths:
        for file in (path, *_below(path)):
            with contextlib.suppress(OSError):
                found.append((str(file), version_of(file)))
    return sorted(found)


def _below(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        yield from (Path(folder) / name for name in [*folders, *files])
