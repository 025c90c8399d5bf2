"""Publishing whole folders: written beside, then renamed; the first one stays."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.storage.publishing.publish import beside_of, make_folder, storage_errors, sync_folder


@contextmanager
def publishing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; publish it under `path` when the block succeeds.

    For content that its name determines: where someone else has published `path` meanwhile,
    theirs stays and ours is discarded. A failed block leaves nothing behind.
    """
    with storage_errors(path):
        make_folder(path.parent)
        beside = beside_of(path)
        beside.mkdir()
        try:
            yield beside
            sync_tree(beside)
            _rename_unless_there(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        sync_folder(path.parent)


def sync_tree(path: Path) -> None:
    """Make a file, or a folder with all that is in it, last through a loss of power."""
    for each in (*path.rglob("*"), path):
        if each.is_dir():
            sync_folder(each)
            continue
        with each.open("rb") as file:
            os.fsync(file.fileno())


def _rename_unless_there(beside: Path, path: Path) -> None:
    try:
        # renaming onto a folder that is not empty fails: nobody's work is replaced
        beside.rename(path)
    except OSError:
        if not path.is_dir():
            raise
