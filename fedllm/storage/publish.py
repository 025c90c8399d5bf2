"""The one authority for publishing files: write beside, fsync, rename, fsync the folder."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.errors import RunDirectoryError, StorageFull

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line that names `path` and the remedy.

    Raises:
        StorageFull: no space or quota is left.
        RunDirectoryError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = os.strerror(error.errno or errno.ENOSPC).lower()
            raise StorageFull(f"{path}: {reason}; make space, then resume the run") from error
        if error.errno in _REFUSED:
            reason = os.strerror(error.errno or errno.EACCES).lower()
            raise RunDirectoryError(
                f"{path}: cannot be written ({reason}); choose a writable directory"
            ) from error
        raise


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; publish it under `path` when the block succeeds.

    A reader sees the old file or the whole new one. A failed block leaves nothing behind.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
        try:
            yield beside
            with beside.open("rb") as written:
                os.fsync(written.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


def publish_bytes(path: Path, content: bytes) -> None:
    """Publish `content` under `path`."""
    with publishing(path) as beside:
        beside.write_bytes(content)


def publish_once(path: Path, content: bytes) -> bool:
    """Publish `content` unless `path` exists already; say whether it was this call that did.

    Uses `link`, the lock that is safe on NFS and Lustre; a link whose answer was lost is
    recognised by its link count.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f".{path.name}.{uuid.uuid4().hex}.part"
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(beside, path)
            except FileExistsError:
                return beside.stat().st_nlink > 1
            _fsync_folder(path.parent)
            return True
        finally:
            beside.unlink(missing_ok=True)
