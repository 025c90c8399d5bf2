"""Copies of shared files on a node's own disk, made once per node for all its tasks."""

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

_POLL_SECONDS = 0.2


def node_folder(configured: str) -> Path:
    """Return the folder that `storage.node_local` names on this node.

    Raises:
        OSError: it contains a variable that is not set here, or it is not absolute.
    """
    folder = Path(os.path.expandvars(configured)).expanduser()
    if not folder.is_absolute() or "$" in str(folder):
        raise OSError(f"{folder} is no absolute path on this node")
    return folder


def staged_folder(source: Path, name: Path, configured: str) -> tuple[Path, str]:
    """Return the folder to read `source` from, and why it is not the node's disk (else "").

    Args:
        source: a folder on shared storage.
        name: the path of its copy below that folder; it identifies the content.
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
    with _locked(target.with_name(f"{target.name}.lock")):
        # another task of this node may have made the copy meanwhile
        if target.is_dir():
            return
        for leftover in target.parent.glob(f".{target.name}.*.part"):
            # a killed task left it: nobody else writes here now
            shutil.rmtree(leftover, ignore_errors=True)
        _require_space(source, target)
        files = _files(source)
        with publishing_folder(target, sources=files) as temporary:
            for file in files:
                place = temporary / file.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold a lock; the kernel releases that of a process that died.

    flock is safe on the node's own disk; the run directory is locked by `link`.
    """
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # signals are handled between two attempts
                time.sleep(_POLL_SECONDS)
        yield


def _require_space(source: Path, target: Path) -> None:
    """Raise OSError if the copy would fill the disk, which others use too."""
    needed = sum(file.stat().st_size for file in _files(source))
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder, without hidden ones (`.git`, `.cache`)."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
