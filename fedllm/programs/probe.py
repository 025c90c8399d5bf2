"""The probe of `fedllm doctor` on a compute node: `python -m fedllm.programs.probe FOLDER`.

It prints its findings as one JSON line. Then, for every line on its input, it waits for the file
that the other side has just written, and prints the seconds that this took. It uses its own clock
alone: clocks of two machines are not compared.
"""

import argparse
import importlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedllm.doctor.trials import (
    FileDelayRecord,
    NodeRecord,
    installed_versions,
    nearest_folder,
    seconds_until,
    trial_folder,
    try_folder,
)
from fedllm.errors import FedllmError, UserError
from fedllm.scheduling.environment import TaskEnvironment
from fedllm.scheduling.seam import SchedulerUnreachable
from fedllm.scheduling.slurm.commands import CommandRefused, call
from fedllm.storage.paths import ProbePaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.publishing.staging import node_folder
from fedllm.storage.trust.secret import secret_digest

_IMPORTED = ("torch", "transformers", "peft")
# commands that change nothing, of the programs that the coordinator and a requeuing task call
_COMMANDS = {
    "sbatch": ("sbatch", "--test-only", "--time=1", "--output=/dev/null", "--wrap=true"),
    "squeue": ("squeue", "--noheader", f"--user={os.getuid()}", "-o", "%i"),
    "scontrol": ("scontrol", "ping"),
}


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedllm.programs.probe", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--also", type=Path, action="append", default=[], help="a path that must exist too"
    )
    parser.add_argument("--node-local", metavar="DIR", help="a folder on the node's own disk")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a file")
    arguments = parser.parse_args(argv)
    paths, max_seconds = ProbePaths(root=arguments.folder), arguments.patience
    _print(look(paths, arguments.also, arguments.node_local, max_seconds))
    for _ in sys.stdin:
        seconds = seconds_until(paths.submitter_file.exists, max_seconds=max_seconds)
        _print(FileDelayRecord(seconds=seconds))
    return 0


def look(
    paths: ProbePaths, also: Sequence[Path], node_local: str | None, max_seconds: float
) -> NodeRecord:
    """Return the findings on this node; the probe's folder may appear `max_seconds` late."""
    broken = dict(_broken_packages())
    local_bytes, local_problem = _node_local(node_local)
    secret, secret_problem = _secret()
    return NodeRecord(
        node=TaskEnvironment().node,
        host=socket.gethostname(),
        python=f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})",
        versions=dict(installed_versions()),
        broken=broken,
        gpus=[] if "torch" in broken else _gpus(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        refused=dict(_refused_commands()),
        storage_problem=_storage_problem(paths, max_seconds),
        absent=[str(path) for path in also if not path.exists()],
        local_bytes=local_bytes,
        local_problem=local_problem,
        secret=secret,
        secret_problem=secret_problem,
        clock=time.time(),
    )


def _print(record: NodeRecord | FileDelayRecord) -> None:
    sys.stdout.write(record.model_dump_json() + "\n")
    sys.stdout.flush()


def _broken_packages() -> Iterator[tuple[str, str]]:
    for package in _IMPORTED:
        try:
            importlib.import_module(package)
        except Exception as error:  # a broken installation raises anything
            yield package, (str(error) or type(error).__name__).splitlines()[0]


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]


def _refused_commands() -> Iterator[tuple[str, str]]:
    for name, words in _COMMANDS.items():
        try:
            call(words)
        except (CommandRefused, SchedulerUnreachable, UserError) as error:
            yield name, str(error)


def _storage_problem(paths: ProbePaths, max_seconds: float) -> str:
    if seconds_until(paths.root.is_dir, max_seconds=max_seconds) is None:
        place = paths.runs_folder
        return f"{place} is another folder there" if place.is_dir() else f"{place} is not there"
    try:
        try_folder(paths.root)
        # this first look fails: a cache that remembers the failure then shows in the seconds
        paths.submitter_file.exists()
        publish_bytes(paths.node_file, b"{}")
    except (FedllmError, OSError) as error:
        return str(error)
    return ""


def _node_local(configured: str | None) -> tuple[int | None, str]:
    if configured is None:
        return None, ""
    try:
        with trial_folder(nearest_folder(node_folder(configured))) as folder:
            return shutil.disk_usage(folder).free, ""
    except (FedllmError, OSError) as error:
        return None, str(error)


def _secret() -> tuple[str, str]:
    try:
        return secret_digest(), ""
    except UserError as error:
        return "", str(error)


def _memory_bytes() -> int | None:
    """Return the smallest memory limit of the control groups above this process."""
    files = []
    for line in _read_lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        root = Path("/sys/fs/cgroup", controllers)
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / path.lstrip("/")
        files += [_read_lines(folder / name) for folder in (group, *group.parents)]
    limits = [int(lines[0]) for lines in files if lines and lines[0].isdigit()]
    # without a limit, version 1 of the control groups gives nearly 2 ** 63
    return min((limit for limit in limits if limit < 2**60), default=None)


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
