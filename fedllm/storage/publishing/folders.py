"""Publication of whole folders: written beside, then renamed; the first one stays."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.storage.publishing.publish import (
    make_folder,
    storage_errors,
    sync_folder,
    temporary_name,
)


@contextmanager
def publishing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; publish it as `path` when the block succeeds.

    The name must determine the content: if another process has published `path` meanwhile, its
    folder stays and ours is discarded. A failed block leaves nothing behind.
    """
    with storage_errors(path):
        make_folder(path.parent)
        temporary = temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            _rename_unless_there(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)


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
