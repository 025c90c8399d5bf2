"""What a process's environment says of the task that it is: the one place that reads it."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm.errors import UserError
from fedllm.storage.lease import process_start_time


@dataclass(frozen=True, kw_only=True)
class TaskIdentity:
    """A task, the node it runs on and its log file: what a claim belongs to.

    A requeued array task is the same task; a local process that starts anew is another. `array`
    is the name of its batch job, empty elsewhere.

    A task may be several processes: this one has rank `rank` of `num_processes`, and `local_rank`
    among those of its node. They meet at `rendezvous` (host:port), empty where there is one.
    """

    task: str
    node: str
    log: str
    array: str = ""
    rank: int = 0
    num_processes: int = 1
    local_rank: int = 0
    rendezvous: str = ""

    @property
    def is_first(self) -> bool:
        """Whether this process claims, reports and publishes for its task."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class TaskEnvironment:
    """The variables by which a batch system or another starter tells a process its task.

    `FEDLLM_TASK`, `FEDLLM_LOG`, `FEDLLM_PROCESSES` and `FEDLLM_RENDEZVOUS` are ours: the script of
    a task exports them, and a process that takes task after task notes them itself, with its
    `FEDLLM_RANK` and `FEDLLM_LOCAL_RANK`.
    """

    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def identity(self) -> TaskIdentity:
        """Who this process is.

        The task is what its starter calls it, else the Slurm array task or job, else host, process
        id and start time.
        """
        return TaskIdentity(
            task=self.variables.get("FEDLLM_TASK") or self._array_task or self.job or _local_task(),
            node=self.node,
            log=_log(self.variables.get("FEDLLM_LOG", ""), self._rank("")),
            array=self.variables.get("SLURM_JOB_NAME", ""),
            rank=self._rank(""),
            num_processes=self._num_processes,
            local_rank=self._rank("LOCAL_"),
            rendezvous=self.variables.get("FEDLLM_RENDEZVOUS", ""),
        )

    @property
    def node(self) -> str:
        """The node of this process: on a cluster of virtual nodes all hosts have one name."""
        return self.variables.get("SLURMD_NODENAME") or socket.gethostname()

    @property
    def job(self) -> str | None:
        """The batch job that this process runs in; None: it runs in none."""
        return self.variables.get("SLURM_JOB_ID") or None

    def is_array_task(self, task: str) -> bool:
        """Say whether this process is `task` of an array that fedllm submitted.

        Not so within an allocation of the user's own: requeueing that would restart more than us.
        """
        return task == self.variables.get("FEDLLM_TASK") == self._array_task

    def require_planned_processes(self) -> None:
        """Raise UserError if srun started this task as more or fewer processes than its plan says.

        The plan is `FEDLLM_PROCESSES`, which the task's script exports; by hand it is one process.
        What runs within somebody else's step, as a local worker does, is asked nothing.

        Raises:
            UserError: the processes would all do the whole work of the task.
        """
        task = self.variables.get("FEDLLM_TASK")
        if task and task != (self._array_task or self.job):
            return
        step = self.variables.get("SLURM_STEP_NUM_TASKS")
        rank = self.variables.get("SLURM_PROCID", "0")
        planned = self._num_processes
        if int(step or planned) == planned and int(rank) < planned:
            return
        raise UserError(
            f"process {rank} of {step or '?'} that srun started (SLURM_PROCID, "
            f"SLURM_STEP_NUM_TASKS) for a task of {planned}: each would do the same work; start it "
            f"with srun --ntasks={planned}, and let no wrapper of srun or line of scheduler.setup "
            "change that"
        )

    @property
    def _num_processes(self) -> int:
        return int(self.variables.get("FEDLLM_PROCESSES") or "1")

    def _rank(self, kind: str) -> int:
        """Return the rank among all processes (""), or among those of this node ("LOCAL_")."""
        if self._num_processes == 1:
            # within somebody else's step ranks are somebody else's
            return 0
        slurms = {"": "SLURM_PROCID", "LOCAL_": "SLURM_LOCALID"}[kind]
        found = self.variables.get(f"FEDLLM_{kind}RANK") or self.variables.get(slurms)
        return int(found or "0")

    @property
    def _array_task(self) -> str | None:
        array = self.variables.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{self.variables.get('SLURM_ARRAY_TASK_ID', '0')}" if array else None


def become_task(task: str, log: str) -> None:
    """Note in this process's environment which task it works on from now on, and its log."""
    os.environ.update(task_variables(task, log))


def task_variables(task: str, log: str) -> dict[str, str]:
    """Return the variables by which whoever starts a task tells it its name and its log."""
    return {"FEDLLM_TASK": task, "FEDLLM_LOG": log}


def process_variables(rank: int, count: int, rendezvous: str) -> dict[str, str]:
    """Return the variables by which whoever starts a task tells a process which one it is."""
    return {
        "FEDLLM_PROCESSES": str(count),
        "FEDLLM_RANK": str(rank),
        "FEDLLM_LOCAL_RANK": str(rank),
        "FEDLLM_RENDEZVOUS": rendezvous,
    }


def _log(pattern: str, rank: int) -> str:
    """Return the log of a process: `%t` in the name of the file stands for its rank, as in srun."""
    folder, slash, name = pattern.rpartition("/")
    return f"{folder}{slash}{name.replace('%t', str(rank))}"


def _local_task() -> str:
    pid = os.getpid()
    return f"local:{socket.gethostname()}:{pid}:{process_start_time(pid) or ''}"
