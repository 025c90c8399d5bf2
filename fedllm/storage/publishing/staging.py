"""Copies on a node's own disk, made once per node, of what every task of it reads."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.errors import FedllmError
from fedllm.storage.publishing.folders import publishing_folder
from fedllm.storage.publishing.publish import make_folder

_LOOK_SECONDS = 0.2


def node_folder(configured: str) -> Path:
    """Return `storage.node_local` as it is on this node.

    Raises:
        OSError: a variable in it is not set here, or it is not absolute.
    """
    folder = Path(os.path.expandvars(configured)).expanduser()
    if not folder.is_absolute() or "$" in str(folder):
        raise OSError(f"{folder} is no absolute path on this node")
    return folder


def near(source: Path, name: Path, configured: str) -> tuple[Path, str]:
    """Return where to read `source` from, and why not from this node's disk, else nothing.

    Args:
        source: a folder on shared storage.
        name: of its copy, below that folder; it tells the content.
        configured: `storage.node_local`.
    """
    try:
        target = node_folder(configured) / name
        if not target.is_dir():
            _copy_once(source, target)
    except (FedllmError, OSError) as error:
        return source, f"storage.node_local: {configured}: {error}; reading {source} itself"
    return target, ""


def _copy_once(source: Path, target: Path) -> None:
    make_folder(target.parent)
    with _alone(target.with_name(f"{target.name}.lock")):
        # another task of this node may have made it meanwhile
        if target.is_dir():
            return
        for left in target.parent.glob(f".{target.name}.*.part"):
            # of a task that was killed: nobody else writes here now
            shutil.rmtree(left, ignore_errors=True)
        _need_room(source, target)
        with publishing_folder(target) as beside:
            for file in _files(source):
                place = beside / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock; the kernel gives back that of a process which died.

    Right on a disk of the node's own, where it is for; the run directory is locked by `link`.
    """
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # a signal is noted between two looks
                time.sleep(_LOOK_SECONDS)
        yield


def _need_room(source: Path, target: Path) -> None:
    """Refuse before the disk is full: others use it too."""
    wanted = sum(file.stat().st_size for file in _files(source))
    free = shutil.disk_usage(target.parent).free
    if wanted > free:
        raise OSError(errno.ENOSPC, f"{wanted / 2**30:.1f} GiB wanted, {free / 2**30:.1f} GiB free")


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder; hidden ones (`.git`, `.cache`) are nothing to load."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
