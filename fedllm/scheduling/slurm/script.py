"""What a task's script says: its log, what it exports, and the step that is our program."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from fedllm.config.models import SchedulerSection
from fedllm.errors import RunDirectoryError
from fedllm.planning.sbatch_options import PROCESSES
from fedllm.scheduling.heap import shell_line
from fedllm.scheduling.seam import Job
from fedllm.scheduling.slurm.commands import clean_environment
from fedllm.scheduling.slurm.sbatch_flags import Flags

# Where libraries keep what they compiled: thousands of small files that a shared home suffers from.
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "XDG_CACHE_HOME": "cache",
}
# below the ports that systems give to outgoing connections
_FIRST_PORT, _NUM_PORTS = 15000, 15000
# `prepare` fetches: what it need not fetch again stays where it is
_FETCHED = {"HF_HOME": "huggingface"}


def log_pattern(folder: Path, name: str) -> str:
    """Return a log as `--output` takes it: Slurm replaces %A, %a and %j in `name`, not in `folder`.

    Raises:
        RunDirectoryError: a path that cannot be said to Slurm.
    """
    path = str(folder.resolve())
    # sbatch(1), filename pattern: with a backslash nothing is replaced, and no other sign says one
    unsayable = {
        "a line break": {"\n", "\r"} & {*path},
        "a backslash": {"\\"} & {*path},
        "bytes that are not UTF-8": path.encode(errors="ignore") != os.fsencode(path),
    }
    for word, found in unsayable.items():
        if found:
            raise RunDirectoryError(
                f"{path!r}: Slurm writes no logs to a path with {word}; take another --run-dir"
            )
    return f"{path.replace('%', '%%')}/{name}"


def python_words(section: SchedulerSection) -> str:
    """Return what runs Python in a job, as a shell reads it.

    `scheduler.python` may be several words: `apptainer exec image.sif python`.
    """
    return section.python or shlex.quote(sys.executable)


def step_words(flags: Flags, log: str) -> list[str]:
    """Return srun for the one step of a task; the program follows.

    Its size is said, not taken from the allocation: that is larger than what was asked for where
    cores have two threads, and where nodes are given whole.
    """
    words = ["srun", "--unbuffered", f"--output={log}", "--open-mode=append"]
    words += ["--kill-on-bad-exit=1", "--export=ALL"]
    words += [f"--nodes={flags.get('nodes', 1)}", f"--ntasks={_processes(flags)}"]
    if _processes(flags) > 1:
        words.append(f"--ntasks-per-node={flags['ntasks-per-node']}")
    if "cpus-per-task" in flags:
        # srun does not take it over from sbatch since Slurm 22.05
        words.append(f"--cpus-per-task={flags['cpus-per-task']}")
    return words


def exports(job: Job, flags: Flags) -> list[str]:
    """Return the lines that tell a task who it is and what it inherits, whatever `--export`."""
    folder = shlex.quote(str(job.log_folder.resolve()))
    inherited = {
        name: value
        for name, value in sorted(clean_environment().items())
        if name.startswith("FEDLLM_")
    }
    caches = _CACHES
    if job.program != "prepare":
        inherited["HF_HUB_OFFLINE"] = "1"
        caches = _CACHES | _FETCHED
    return [
        'export FEDLLM_TASK="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        f"export FEDLLM_PROCESSES={_processes(flags)}",
        *_several(folder, flags),
        *(f"export {name}={shlex.quote(value)}" for name, value in inherited.items()),
        shell_line(),
        *_scratch(),
        *(f'export {name}="${{{name}:-$fedllm_scratch/{kind}}}"' for name, kind in caches.items()),
    ]


def processes_of(job: Job) -> Mapping[str, int]:
    """Return the flags of sbatch that say how many processes a task of a job is, and where."""
    processes, nodes = job.processes_per_task, job.nodes_per_task
    per_node = {"ntasks-per-node": processes // nodes} if processes > 1 else {}
    return {"nodes": nodes, "ntasks": processes, **per_node}


def _processes(flags: Flags) -> int:
    return int(flags.get("ntasks", PROCESSES))


def _several(folder: str, flags: Flags) -> list[str]:
    """Return the lines that tell a process its log, and where all of a task meet."""
    if _processes(flags) == 1:
        return [f'export FEDLLM_LOG={folder}/"${{FEDLLM_TASK}}_0_log.out"']
    # the script runs on the first node, as the process of rank 0 does
    port = f"$(({_FIRST_PORT} + SLURM_JOB_ID % {_NUM_PORTS}))"
    return [
        f'export FEDLLM_LOG={folder}/"${{FEDLLM_TASK}}_%t_log.out"',
        f'export FEDLLM_RENDEZVOUS="$(hostname):{port}"',
    ]


def _scratch() -> list[str]:
    """Return the lines that find a folder of our own on the node's disk, for all our jobs there.

    Code is run from it: one that somebody else made first is not used.
    """
    return [
        'fedllm_scratch="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/fedllm-$(id -u)"',
        'mkdir -p -m 700 "$fedllm_scratch"',
        '[ -O "$fedllm_scratch" ] || fedllm_scratch="$(mktemp -d)"',
    ]
