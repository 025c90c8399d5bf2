"""Filling of a folder that the user named: its files appear together or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedllm.storage.publishing.folders import sync_tree
from fedllm.storage.publishing.publish import storage_errors, sync_folder


@contextmanager
def filling_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """Give a temporary folder within `folder`; its files move up when the block succeeds.

    `folder` is new or empty. It may be a mount point, which cannot be the target of a rename, so
    the files move one by one. The file `last`, which readers look for first, moves after all
    others. A failed block removes what it made, including new folders above `folder`.

    Raises:
        StorageFull: no space or quota is left.
        RunDirectoryError: the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = folder / f".{uuid.uuid4().hex}.part"
    moved: list[Path] = []
    try:
        with storage_errors(folder):
            temporary.mkdir(parents=True)
            yield temporary
            for file in sorted(
                temporary.iterdir(), key=lambda path: (path.name == last, path.name)
            ):
                sync_tree(file)
                moved.append(file.rename(folder / file.name))
            temporary.rmdir()
            sync_folder(folder)
    except BaseException:
        _remove([temporary, *moved], made)
        raise


def _remove(written: list[Path], made: list[Path]) -> None:
    for path in written:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with suppress(OSError):
            path.unlink()
    # a folder that another process has filled meanwhile stays
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
