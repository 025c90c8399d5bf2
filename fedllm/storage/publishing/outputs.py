"""Filling a folder that the user named: its files appear together, or the disk is as it was."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedllm.storage.publishing.folders import sync_tree
from fedllm.storage.publishing.publish import storage_errors, sync_folder


@contextmanager
def filling(folder: Path, *, last: str) -> Iterator[Path]:
    """Give a temporary folder within `folder`; its files move up when the block succeeds.

    `folder` is new or empty. It may be a mount point, which cannot be renamed onto, so the files
    move one by one, `last` (the one that readers look for first) after all others. A failed block
    takes away what it made, also the folders above `folder`.

    Raises:
        StorageFull: no space or quota is left.
        RunDirectoryError: the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    inside = folder / f".{uuid.uuid4().hex}.part"
    moved: list[Path] = []
    try:
        with storage_errors(folder):
            inside.mkdir(parents=True)
            yield inside
            for file in sorted(inside.iterdir(), key=lambda path: (path.name == last, path.name)):
                sync_tree(file)
                moved.append(file.rename(folder / file.name))
            inside.rmdir()
            sync_folder(folder)
    except BaseException:
        _take_away([inside, *moved], made)
        raise


def _take_away(written: list[Path], made: list[Path]) -> None:
    for path in written:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(OSError):
            path.unlink()
    # a folder that someone else has filled meanwhile stays
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
