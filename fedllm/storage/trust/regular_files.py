"""Regular files: what lies in a run directory is opened only if it is one, and of the right owner.

A FIFO would hang whoever opens it, a link leads elsewhere, a device may do anything.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_RECORD_BYTES = 256 << 20
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WORDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


class ForeignFileError(OSError):
    """Error for a file that is not a regular file of the run's user or group."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        FileNotFoundError: there is none.
        ForeignFileError: it is a link, FIFO, device or folder, or of a stranger.
    """
    return _opened(path, _READ, "rb")


def append_regular(path: Path) -> BinaryIO:
    """Open a file, a new one if there is none, to write at its end.

    Raises:
        ForeignFileError: as for `open_regular`.
    """
    return _opened(path, _APPEND, "ab")


def read_record(path: Path) -> bytes:
    """Read a record's file, which has a bounded size.

    Raises:
        FileNotFoundError: there is none.
        ForeignFileError: as for `open_regular`, or the file is far larger than any record.
    """
    with open_regular(path) as file:
        content = file.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise ForeignFileError(f"has more than {MAX_RECORD_BYTES >> 20} MiB, and is no record")
    return content


def _opened(path: Path, flags: int, mode: str) -> BinaryIO:
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ForeignFileError("is a symbolic link, need a regular file") from error
        if error.errno in {errno.EISDIR, errno.ENXIO}:
            raise ForeignFileError("is a folder or FIFO, need a regular file") from error
        raise
    try:
        _require_own(path, os.fstat(descriptor))
        file: BinaryIO = open(descriptor, mode)  # type: ignore[assignment]  # noqa: PTH123, SIM115
    except BaseException:
        os.close(descriptor)
        raise
    return file


def _require_own(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        words = (word for is_kind, word in _WORDS.items() if is_kind(status.st_mode))
        raise ForeignFileError(f"is {next(words, 'something else')}, need a regular file")
    if status.st_uid in {os.geteuid(), 0}:
        return
    folder = path.parent.stat()
    if status.st_uid != folder.st_uid and status.st_gid != folder.st_gid:
        raise ForeignFileError(
            f"is of user {status.st_uid}, who is neither the owner nor in the group of its folder"
        )
