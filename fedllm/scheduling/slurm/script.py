"""The script of a task: its log, its exports, and the srun step that runs our program."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from fedllm.config.models import SchedulerSection
from fedllm.errors import RunDirectoryError
from fedllm.scheduling.heap import shell_line
from fedllm.scheduling.seam import Job, TaskSize
from fedllm.scheduling.slurm.commands import clean_environment
from fedllm.scheduling.slurm.sbatch_flags import PROCESSES, Flags
from fedllm.storage.trust.secret import STATE_VARIABLE, state_folder

# Caches of compiled code: thousands of small files that would slow a shared home.
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "XDG_CACHE_HOME": "cache",
}
# below the ports that the system gives to outgoing connections
_FIRST_PORT, _NUM_PORTS = 15000, 15000
_VARIABLE = re.compile(r"[A-Za-z0-9_]+")
# not for `prepare`: it downloads, and keeps the user's own HF_HOME
_FETCHED = {"HF_HOME": "huggingface"}


def log_pattern(folder: Path, name: str) -> str:
    """Return a log's path for `--output`: Slurm replaces %A, %a and %j in `name`, not in `folder`.

    Raises:
        RunDirectoryError: Slurm cannot take the path.
    """
    path = str(folder.resolve())
    # sbatch(1), filename pattern: a backslash turns replacement off, and cannot be escaped
    forbidden = {
        "a line break": {"\n", "\r"} & {*path},
        "a backslash": {"\\"} & {*path},
        "bytes that are not UTF-8": path.encode(errors="ignore") != os.fsencode(path),
    }
    for word, found in forbidden.items():
        if found:
            raise RunDirectoryError(
                f"{path!r}: Slurm writes no logs to a path with {word}; take another --run-dir"
            )
    return f"{path.replace('%', '%%')}/{name}"


def python_words(section: SchedulerSection) -> str:
    """Return the shell words that start Python in a job.

    `scheduler.python` may have several words: `apptainer exec image.sif python`.
    """
    return section.python or shlex.quote(sys.executable)


def step_words(flags: Flags, log: str) -> list[str]:
    """Return the srun command of a task's only step, without the program.

    The step gets an explicit size, because the allocation may be larger than requested: on cores
    with two threads, and where Slurm gives whole nodes.
    """
    words = ["srun", "--unbuffered", f"--output={log}", "--open-mode=append"]
    words += ["--kill-on-bad-exit=1", "--export=ALL"]
    words += [f"--nodes={flags.get('nodes', 1)}", f"--ntasks={_processes(flags)}"]
    if _processes(flags) > 1:
        words.append(f"--ntasks-per-node={flags['ntasks-per-node']}")
    if "cpus-per-task" in flags:
        # since Slurm 22.05 srun does not inherit this from sbatch
        words.append(f"--cpus-per-task={flags['cpus-per-task']}")
    return words


def exports(job: Job, flags: Flags) -> list[str]:
    """Return the lines that export a task's name, log and settings, whatever `--export` says."""
    folder = shlex.quote(str(job.log_folder.resolve()))
    inherited = fedllm_variables()
    caches = _CACHES
    if job.program != "prepare":
        inherited["HF_HUB_OFFLINE"] = "1"
        caches = _CACHES | _FETCHED
    return [
        'export FEDLLM_TASK="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        f"export FEDLLM_PROCESSES={_processes(flags)}",
        *_log_and_rendezvous(folder, flags),
        *(f"export {name}={shlex.quote(value)}" for name, value in inherited.items()),
        shell_line(),
        *_scratch(),
        *(f'export {name}="${{{name}:-$fedllm_scratch/{kind}}}"' for name, kind in caches.items()),
    ]


def fedllm_variables() -> dict[str, str]:
    """Return the variables of fedllm that a job has too, and where it finds the user's secret."""
    variables = {
        name: value
        for name, value in sorted(clean_environment().items())
        if name.startswith("FEDLLM_") and _VARIABLE.fullmatch(name)
    }
    return {**variables, STATE_VARIABLE: str(state_folder())}


def interface_lines(section: SchedulerSection) -> list[str]:
    """Return the lines that export the network interface of several processes."""
    if section.interface is None:
        return []
    name = shlex.quote(section.interface)
    return [f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}"]


def size_flags(size: TaskSize) -> Mapping[str, int]:
    """Return the flags of sbatch for the number of processes and nodes of a task."""
    per_node = {"ntasks-per-node": size.processes // size.nodes} if size.processes > 1 else {}
    return {"nodes": size.nodes, "ntasks": size.processes, **per_node}


def _processes(flags: Flags) -> int:
    return int(flags.get("ntasks", PROCESSES))


def _log_and_rendezvous(folder: str, flags: Flags) -> list[str]:
    """Return the lines that export a task's log, and the rendezvous of several processes."""
    if _processes(flags) == 1:
        return [f'export FEDLLM_LOG={folder}/"${{FEDLLM_TASK}}_0_log.out"']
    # the script runs on the first node, as the process of rank 0 does
    port = f"$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))"
    return [
        f'export FEDLLM_LOG={folder}/"${{FEDLLM_TASK}}_%t_log.out"',
        f'export FEDLLM_RENDEZVOUS="$(hostname):{port}"',
    ]


def _scratch() -> list[str]:
    """Return the lines that find this user's scratch folder on the node's disk.

    Compiled code runs from it, so a folder that another user made first is not used.
    """
    return [
        'fedllm_scratch="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/fedllm-$(id -u)"',
        'mkdir -p -m 700 "$fedllm_scratch"',
        '[ -O "$fedllm_scratch" ] || fedllm_scratch="$(mktemp -d)"',
    ]
