"""Publication of whole folders: written beside, then renamed; the first one stays."""

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedllm.storage.publishing.publish import (
    make_folder,
    storage_errors,
    sync_folder,
    temporary_name,
)
from fedllm.storage.trust.source_readers import readers_of

_NOT_OWNER = 0o077


@contextmanager
def publishing_folder(path: Path, *, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Give a temporary folder beside `path`; publish it as `path` when the block succeeds.

    The name must determine the content: if another process has published `path` meanwhile, its
    folder stays and ours is discarded. A failed block leaves nothing behind. Nobody can read the
    folder who cannot read the `sources` of its content.
    """
    with storage_errors(path):
        make_folder(path.parent)
        temporary = temporary_name(path)
        temporary.mkdir()
        usual = stat.S_IMODE(temporary.stat().st_mode)
        if sources:
            temporary.chmod(usual & ~_NOT_OWNER)
        try:
            yield temporary
            if sources:
                _limit_readers(temporary, usual, sources)
            sync_tree(temporary)
            _rename_unless_there(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)


def _limit_readers(folder: Path, usual: int, sources: Sequence[Path]) -> None:
    """Give a folder its usual mode, and the files in it too, without what the sources deny."""
    denied = _NOT_OWNER & ~readers_of(sources, group=folder.stat().st_gid)
    for file in folder.iterdir():
        file.chmod(stat.S_IMODE(file.stat().st_mode) & ~denied)
    folder.chmod(usual & ~denied)


def sync_tree(path: Path) -> None:
    """Make a file, or a folder with everything in it, survive a loss of power."""
    for entry in (*path.rglob("*"), path):
        if entry.is_dir():
            sync_folder(entry)
            continue
        with entry.open("rb") as file:
            os.fsync(file.fileno())


def _rename_unless_there(temporary: Path, path: Path) -> None:
    try:
        # renaming onto a non-empty folder fails, so no other folder is replaced
        temporary.rename(path)
    except OSError:
        if not path.is_dir():
            raise
