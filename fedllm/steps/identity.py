"""Which task this process is: what a claim belongs to."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.errors import UserError
from fedllm.storage.lease import process_start_time


@dataclass(frozen=True, kw_only=True)
class TaskIdentity:
    """A task, the node it runs on and its log file.

    A requeued array task is the same task; a local process that starts anew is another. `array`
    is the name of its Slurm job, empty elsewhere.
    """

    task: str
    node: str
    log: str
    array: str = ""


def task_identity(environment: Mapping[str, str] = os.environ) -> TaskIdentity:
    """Return who this process is.

    `FEDLLM_TASK` (set by whatever started it), else the Slurm array task or job, else host,
    process id and start time.
    """
    return TaskIdentity(
        task=environment.get("FEDLLM_TASK") or _slurm_task(environment) or _local_task(),
        # on a cluster of virtual nodes all hosts have one name
        node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        log=environment.get("FEDLLM_LOG", ""),
        array=environment.get("SLURM_JOB_NAME", ""),
    )


def require_planned_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if srun started this task as more or fewer processes than its plan says.

    The plan is `FEDLLM_PROCESSES`, which the task's script exports; by hand it is one process. What
    runs within somebody else's step, as a local worker does, is asked nothing.

    Raises:
        UserError: the processes would all do the whole work of the task.
    """
    step, rank = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_PROCID", "0")
    task = environment.get("FEDLLM_TASK")
    if task and task != _slurm_task(environment):
        return
    planned = environment.get("FEDLLM_PROCESSES", "1")
    if (step or planned) == planned and int(rank) < int(planned):
        return
    raise UserError(
        f"process {rank} of {step or '?'} that srun started (SLURM_PROCID, SLURM_STEP_NUM_TASKS) "
        f"for a task of {planned}: each would do the same work; start it with srun "
        f"--ntasks={planned}, and let no wrapper of srun or line of scheduler.setup change that"
    )


def process_seconds() -> float:
    """Return how long ago this process began; 0 where the system does not say."""
    started = process_start_time(os.getpid())
    if started is None:
        return 0.0
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    # a container may count its own uptime
    return max(0.0, uptime - int(started) / os.sysconf("SC_CLK_TCK"))


def _slurm_task(environment: Mapping[str, str]) -> str | None:
    array = environment.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environment.get("SLURM_JOB_ID")


def _local_task() -> str:
    pid = os.getpid()
    return f"local:{socket.gethostname()}:{pid}:{process_start_time(pid) or ''}"
