"""Trial writes to a folder, as runs do them, and the records of a probe on a compute node."""

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
_OTHER_PLACE = "put runs on another file system"


class NodeRecord(Record):
    """A compute node as a job sees it.

    Attributes:
        node: Slurm's name for it.
        host: its host name; virtual nodes share one.
        clock: seconds since the epoch.
        python: version and path of the interpreter.
        versions: package -> installed version.
        broken: package -> why it cannot be imported.
        gpus: names of the GPUs that torch sees.
        cpus: processors that the job may use.
        memory_bytes: the job's memory limit; None: no limit was found.
        refused: Slurm command -> why it does not work there.
        absent: paths that jobs need and the node does not have.
        storage_problem: what is wrong with the trial folder; empty: the node could write to it.
        local_bytes: free bytes of `storage.node_local`; None: it is not set, or not writable.
        local_problem: why the node's own folder cannot be used.
        secret: a digest of the user's secret as the node reads it; empty: it cannot.
        secret_problem: why the node cannot read the secret.
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
    secret: str = ""
    secret_problem: str = ""


class FileDelayRecord(Record):
    """Delay until a node saw a file that another machine wrote; None: it did not see it in time."""

    seconds: float | None


class NetworkRecord(Record):
    """The network of a node: interface -> IPv4 address; `chosen`: that of `scheduler.interface`."""

    node: str
    interfaces: dict[str, str]
    chosen: str


class ReachRecord(Record):
    """Processes on `nodes`, in rank order, summed a tensor of so many bytes in so many seconds."""

    nodes: list[str]
    bytes: int
    seconds: float
    backend: str


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Result of a probe on a compute node.

    Attributes:
        node: the node's record of itself and of the trial folder.
        clock_seconds: how far its clock is ahead of ours, less the time that its answer took.
        seen_here: seconds until this host saw the node's file; None: it did not in time.
        seen_there: seconds until the node saw this host's file; None: it did not in time.
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
    """Make a new folder in `parent`, which must exist, and remove it afterwards.

    Raises:
        RunDirectoryError: `parent` cannot be written.
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
    """Publish a file, replace it, and publish one once, as runs do; return the seconds of one.

    Raises:
        FedllmError: the file system refuses one of these.
        RunDirectoryError: one of these had another effect than runs rely on.
    """
    path = folder / f"{uuid.uuid4().hex}.json"
    publish_bytes(path, b"first")
    start = time.monotonic()
    publish_bytes(path, b"second")
    seconds = time.monotonic() - start
    if path.read_bytes() != b"second":
        raise RunDirectoryError(
            f"{folder}: a rename does not replace the file that was there; {_OTHER_PLACE}"
        )
    if publish_once(path, b"third") or path.read_bytes() != b"second":
        raise RunDirectoryError(
            f"{folder}: a hard link replaces the file that was there; {_OTHER_PLACE}"
        )
    once = path.with_suffix(".once")
    if not publish_once(once, b"only"):
        raise RunDirectoryError(f"{folder}: a hard link to a free name is refused; {_OTHER_PLACE}")
    return seconds


def seconds_until(is_there: Callable[[], bool], *, max_seconds: float) -> float | None:
    """Return the seconds until `is_there` is true; None: more than `max_seconds`."""
    start = time.monotonic()
    while not is_there():
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
        _, mount, kind, *_ = line.split(" ")
        # a blank in a path is written as \040; a later mount covers an earlier one
        kinds[Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount))] = kind
    real = Path(os.path.realpath(folder))
    return next((kinds[point] for point in (real, *real.parents) if point in kinds), "")
