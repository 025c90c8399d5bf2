"""The one place that publishes files: write beside, fsync, rename, fsync the folder."""

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from fedllm.errors import FedllmError, Incomplete, RunDirectoryError, StorageFull, UserError
from fedllm.storage.trust.regular_files import ForeignFileError

Version: TypeAlias = tuple[int, int, int, int]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
# a disk or file server in trouble
_NO_ANSWER = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EREMOTEIO,
}
# in the midst of a run these come and go too: a remount, a file server that lost its users
_COMES_AND_GOES = _NO_ANSWER | {errno.EACCES, errno.EROFS}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


def version_of(path: Path) -> Version:
    """Return the version of a file, which changes with every publication under its name.

    Raises:
        FileNotFoundError: there is none.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into one line that names `path` and the remedy.

    Raises:
        StorageFull: no space or quota is left.
        RunDirectoryError: the folder cannot be written, or the file is not the run's own.
        Incomplete: the disk or file server does not answer.
    """
    try:
        yield
    except ForeignFileError as error:
        raise RunDirectoryError(f"{path}: {error}") from error
    except Exception as error:
        code = _error_code(error)
        reason = os.strerror(code).lower()
        if code in _FULL:
            raise StorageFull(f"{path}: {reason}; make space, then resume the run") from error
        if code in _REFUSED:
            raise RunDirectoryError(
                f"{path}: cannot be written ({reason}); choose a writable directory"
            ) from error
        if code in _NO_ANSWER:
            raise Incomplete(
                f"{path}: {reason}; repair the disk or file server, then resume the run"
            ) from error
        raise


def storage_trouble(error: BaseException) -> str | None:
    """Return what the file system answered in the midst of a run, if that may be over later.

    Any error of the system that no code foresaw counts, but for a missing file; of those that were
    turned into one line, the ones that a disk or file server answers for a while.
    """
    is_answer = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if is_answer and full_storage(error) is None:
        return _described(error)
    cause = error.__cause__
    if cause is None or _error_code(cause) not in _COMES_AND_GOES:
        return None
    return _described(cause)


def as_error(error: OSError) -> FedllmError | None:
    """Return an error of the system that nobody foresaw, as one line with its exit code.

    None: it is not the system's, but that of a library.
    """
    code = error.errno
    if code is None:
        return None
    if full := full_storage(error):
        return StorageFull(f"{full}; make space, then go on")
    if code in _NO_ANSWER or code == errno.EROFS:
        return Incomplete(f"{_described(error)}; repair the disk or file server, then go on")
    return UserError(f"{_described(error)}; check its path and its permissions")


def full_storage(error: BaseException) -> str | None:
    """Return what the file system answered if no space or quota is left."""
    for each in (error, error.__cause__):
        if each is not None and _error_code(each) in _FULL:
            return _described(each)
    return None


def _described(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return str(error)
    reason = (error.strerror or str(error)).lower()
    return f"{error.filename}: {reason}" if error.filename else reason


def _error_code(error: BaseException) -> int:
    """Return the system's error number, 0 if there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    # libraries written in Rust (safetensors, tokenizers) raise their own errors
    match = _RUST_ERROR.search(str(error))
    return int(match[1]) if match else 0


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems write names at once and refuse fsync on folders
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; their names survive a loss of power."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError as error:
        # a file system such as /proc takes no folders
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder)) from error
    sync_folder(folder.parent)


def temporary_name(path: Path) -> Path:
    """Return a temporary name beside `path` that no reader mistakes for a file of the run."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex}.part"


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; publish it as `path` when the block succeeds.

    A reader sees the old file or the whole new one. A failed block leaves nothing behind.
    """
    with storage_errors(path):
        make_folder(path.parent)
        temporary = temporary_name(path)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
                _replace(temporary, path, os.fstat(written.fileno()))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _replace(temporary: Path, path: Path, written: os.stat_result) -> None:
    try:
        temporary.replace(path)
    except FileNotFoundError:
        # NFS: if the answer to a rename was lost, the repeated request finds nothing to rename
        if not (path.exists() and os.path.samestat(path.stat(), written)):
            raise


def publish_bytes(path: Path, content: bytes) -> None:
    """Publish `content` under `path`."""
    with publishing(path) as temporary:
        temporary.write_bytes(content)


def publish_once(path: Path, content: bytes) -> bool:
    """Publish `content` unless `path` exists already; say whether this call did.

    It uses `link`, the lock that is safe on NFS and Lustre. The link count tells that a link was
    made though its answer was lost.

    Raises:
        RunDirectoryError: the file system has no hard links.
    """
    with storage_errors(path):
        make_folder(path.parent)
        temporary = temporary_name(path)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if not _link(temporary, path):
                return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
        return True


def publish_link(path: Path, target: Path) -> None:
    """Publish the file `target` under the name `path` too.

    Raises:
        RunDirectoryError: the file system has no hard links.
    """
    with storage_errors(path):
        make_folder(path.parent)
        temporary = temporary_name(path)
        try:
            _link(target, temporary)
            temporary.replace(path)
        finally:
            # a rename to another name of the same file leaves both
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return temporary.stat().st_nlink > 1
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise RunDirectoryError(
                f"{path}: its file system has no hard links ({os.strerror(error.errno).lower()}), "
                "which claims and leases need; choose a directory on another one"
            ) from error
        raise
    return True


def age_seconds(path: Path) -> float:
    """Return the seconds since a file was published, by its file system's own clock.

    It compares two files of one file system: no decision compares the clocks of two machines.
    """
    with storage_errors(path):
        now = temporary_name(path)
        now.touch()
        try:
            return now.stat().st_mtime - path.stat().st_mtime
        finally:
            now.unlink(missing_ok=True)
