"""Publishing whole folders: written beside, then renamed; the first one stays."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.storage.publish import storage_errors


@contextmanager
def publishing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; publish it under `path` when the block succeeds.

    For content that its name determines: where someone else has published `path` meanwhile,
    theirs stays and ours is discarded. A failed block leaves nothing behind.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
        beside.mkdir()
        try:
            yield beside
            for file in sorted(beside.rglob("*")):
                _fsync(file)
            _fsync(beside)
            _rename_unless_there(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        _fsync(path.parent)


def _rename_unless_there(beside: Path, path: Path) -> None:
    try:
        # renaming onto a folder that is not empty fails: nobody's work is replaced
        beside.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
