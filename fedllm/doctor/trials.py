"""A folder tried out as runs use it, and what a compute node says of itself and of the folder."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedllm.errors import RunDirectoryError
from fedllm.storage.publishing.publish import publish_bytes, publish_once
from fedllm.storage.records import Record

_PACKAGES = ("fedllm", "torch", "transformers", "peft", "tokenizers", "safetensors")
_LOOK_SECONDS = 0.1


class NodeRecord(Record):
    """A compute node as a job sees it.

    Attributes:
        node: Slurm's name of it.
        host: its own name; virtual nodes share one.
        clock: seconds since the epoch.
        python: version and path of the interpreter.
        versions: package -> installed version.
        broken: package -> why it cannot be imported.
        gpus: names of the GPUs that torch sees.
        cpus: processors that the job may use.
        memory_bytes: the limit of the job; None: none was found.
        refused: Slurm command -> why it does not work there.
        absent: paths that jobs need and that are not there.
        storage_problem: what is wrong with the trial folder; empty: it was written.
        local_bytes: free bytes of `storage.node_local`; None: not asked for, or not writable.
        local_problem: why the node's own folder cannot be used.
    """

    node: str
    host: str
    clock: float
    python: str
    versions: dict[str, str]
    broken: dict[str, str]
    gpus: list[str]
    cpus: int
    memory_bytes: int | None
    refused: dict[str, str]
    absent: list[str]
    storage_problem: str
    local_bytes: int | None
    local_problem: str


class FileDelayRecord(Record):
    """How long a node waited for a file that another machine wrote; None: in vain."""

    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe on a node found.

    Attributes:
        node: what it told of itself and of the trial folder.
        clock_seconds: how far its clock is ahead of ours, as far as the way here lets us tell.
        seen_here: seconds until a file of the node's was seen here; None: not in time.
        seen_there: seconds until a file of ours was seen on the node; None: not in time.
    """

    node: NodeRecord
    clock_seconds: float
    seen_here: float | None = None
    seen_there: float | None = None


def installed_versions() -> Iterator[tuple[str, str]]:
    """Yield the packages whose versions a run's results depend on, and their versions."""
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


@contextmanager
def trial_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent`, the nearest that exists, and remove it afterwards.

    Raises:
        RunDirectoryError: nothing can be written there.
    """
    folder = parent / f".fedllm-doctor-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunDirectoryError(f"{parent}: cannot be written ({reason})") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def nearest_folder(path: Path) -> Path:
    """Return the nearest folder at or above `path` that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def try_folder(folder: Path) -> float:
    """Publish, replace, and publish once, as runs do; return the seconds of one publication.

    Raises:
        FedllmError: the file system refuses one of them.
        RunDirectoryError: it does not keep what they promise.
    """
    path = folder / f"{uuid.uuid4().hex}.json"
    publish_bytes(path, b"first")
    start = time.monotonic()
    publish_bytes(path, b"second")
    seconds = time.monotonic() - start
    if path.read_bytes() != b"second":
        raise RunDirectoryError(f"{folder}: a rename does not replace the file that was there")
    if publish_once(path, b"third") or path.read_bytes() != b"second":
        raise RunDirectoryError(f"{folder}: a hard link replaces the file that was there")
    once = path.with_suffix(".once")
    if not publish_once(once, b"only"):
        raise RunDirectoryError(f"{folder}: a hard link to a free name is refused")
    return seconds


def seconds_until(there: Callable[[], bool], *, max_seconds: float) -> float | None:
    """Return how long something took to come about; None: longer than `max_seconds` seconds."""
    start = time.monotonic()
    while not there():
        if time.monotonic() - start > max_seconds:
            return None
        time.sleep(_LOOK_SECONDS)
    return time.monotonic() - start


def file_system(folder: Path) -> str:
    """Return the kind of file system that a folder lies on: `nfs4`, `tmpfs`; empty: unknown."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    kinds: dict[Path, str] = {}
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        # blanks in a path are written as \040; a later mount covers an earlier one
        kinds[Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point))] = kind
    real = Path(os.path.realpath(folder))
    return next((kinds[each] for each in (real, *real.parents) if each in kinds), "")
