"""The task of this process, read from its environment; nothing else reads these variables."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedllm.errors import UserError
from fedllm.storage.lease import process_start_time

_RENEWED_AT = "FEDLLM_RENEWED_AT"


@dataclass(frozen=True, kw_only=True)
class TaskIdentity:
    """A task, its node and its log file. A claim names them.

    A requeued array task stays the same task; a local process that starts again is a new one.
    `array` is the name of its batch job, and empty outside one.

    A task may have several processes. This one has rank `rank` of `num_processes`, and
    `local_rank` among the processes of its node. They meet at `rendezvous` (host:port), which is
    empty for a task of one process. `restarts` counts how often the task was requeued. `renewed_at`
    is when this process replaced the one that took up the task, of `time.monotonic`; None: it took
    up the task itself.
    """

    task: str
    node: str
    log: str
    array: str = ""
    rank: int = 0
    num_processes: int = 1
    local_rank: int = 0
    rendezvous: str = ""
    restarts: str = ""
    renewed_at: float | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process claims, reports and publishes for its task."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class TaskEnvironment:
    """The environment variables that name a process's task.

    Slurm sets its own. fedllm sets `FEDLLM_TASK`, `FEDLLM_LOG`, `FEDLLM_PROCESSES` and
    `FEDLLM_RENDEZVOUS`: the script of a task exports them. A process that runs task after task
    sets them itself, with its `FEDLLM_RANK` and `FEDLLM_LOCAL_RANK`. A process that replaces itself
    sets `FEDLLM_RENEWED_AT`.
    """

    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def identity(self) -> TaskIdentity:
        """The task of this process.

        Its name is `FEDLLM_TASK`, else the Slurm array task or job, else host, process id and
        start time.
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
            restarts=self.variables.get("SLURM_RESTART_COUNT", ""),
            renewed_at=_moment(self.variables.get(_RENEWED_AT, "")),
        )

    @property
    def node(self) -> str:
        """The node of this process, by Slurm's name: virtual nodes share one host name."""
        return self.variables.get("SLURMD_NODENAME") or socket.gethostname()

    @property
    def job(self) -> str | None:
        """The batch job of this process; None: it runs outside a job."""
        return self.variables.get("SLURM_JOB_ID") or None

    def is_array_task(self, task: str) -> bool:
        """Say whether this process is `task` of an array that fedllm submitted.

        False in an allocation of the user's own: to requeue it would restart the user's work too.
        """
        return task == self.variables.get("FEDLLM_TASK") == self._array_task

    def require_planned_processes(self) -> None:
        """Raise UserError if srun started this task as more or fewer processes than its plan says.

        The plan is `FEDLLM_PROCESSES`, which the task's script exports; a program started by hand
        has one process. The number that srun started is not checked for a process inside another
        step, as a local worker is.

        Raises:
            UserError: a variable is missing or wrong, or each process would do the whole work of
                the task.
        """
        if problem := self._mismatch() or self._problem():
            raise UserError(problem)

    def _mismatch(self) -> str | None:
        """Return why srun started another number of processes than planned; None: it did not."""
        task = self.variables.get("FEDLLM_TASK")
        if task and task != (self._array_task or self.job):
            return None
        step = self.variables.get("SLURM_STEP_NUM_TASKS")
        rank = self.variables.get("SLURM_PROCID", "0")
        planned = self._num_processes
        if int(step or planned) == planned and int(rank) < planned:
            return None
        return (
            f"process {rank} of {step or '?'} that srun started (SLURM_PROCID, "
            f"SLURM_STEP_NUM_TASKS) for a task of {planned}: each would do the same work; start it "
            f"with srun --ntasks={planned}, and let no wrapper of srun or line of scheduler.setup "
            "change that"
        )

    def _problem(self) -> str | None:
        """Return what is wrong with the variables that place a process in its task."""
        for name in ("FEDLLM_PROCESSES", "FEDLLM_RANK", "FEDLLM_LOCAL_RANK"):
            value = self.variables.get(name) or "0"
            if not value.isdecimal():
                return f"{name}: got {value!r}, need a whole number"
        count = self._num_processes
        if count == 1:
            return None
        of_task = f"of {count} processes (FEDLLM_PROCESSES)"
        if not any(self.variables.get(name) for name in ("FEDLLM_RANK", "SLURM_PROCID")):
            ranks = f"0 ... {count - 1}"
            return f"FEDLLM_RANK: not set in a task {of_task}; set it to {ranks}, or use srun"
        if self._rank("") >= count:
            return f"FEDLLM_RANK: got {self._rank('')} in a task {of_task}; need less than {count}"
        if not self.variables.get("FEDLLM_RENDEZVOUS"):
            return (
                f"FEDLLM_RENDEZVOUS: not set in a task {of_task}; set it to HOST:PORT of the first "
                "process, the same for all"
            )
        return None

    @property
    def _num_processes(self) -> int:
        count = self.variables.get("FEDLLM_PROCESSES") or "1"
        # what is no number is refused by `require_planned_processes`
        return max(1, int(count)) if count.isdecimal() else 1

    def _rank(self, kind: str) -> int:
        """Return the rank among all processes (""), or among those of this node ("LOCAL_")."""
        if self._num_processes == 1:
            # inside another step the ranks are that step's, not ours
            return 0
        slurm_name = {"": "SLURM_PROCID", "LOCAL_": "SLURM_LOCALID"}[kind]
        rank = self.variables.get(f"FEDLLM_{kind}RANK") or self.variables.get(slurm_name)
        return int(rank) if rank and rank.isdecimal() else 0

    @property
    def _array_task(self) -> str | None:
        array = self.variables.get("SLURM_ARRAY_JOB_ID")
        return f"{array}_{self.variables.get('SLURM_ARRAY_TASK_ID', '0')}" if array else None


def become_task(task: str, log: str) -> None:
    """Set in this process's environment the task that it works on from now on, and its log."""
    os.environ.pop(_RENEWED_AT, None)
    os.environ.update(task_variables(task, log))


def task_variables(task: str, log: str) -> dict[str, str]:
    """Return the environment variables that name a task and its log."""
    return {"FEDLLM_TASK": task, "FEDLLM_LOG": log}


def renewal_variables() -> dict[str, str]:
    """Return the environment variables of a process that replaces this one now, in its task."""
    return {_RENEWED_AT: repr(time.monotonic())}


def process_variables(rank: int, count: int, rendezvous: str) -> dict[str, str]:
    """Return the environment variables that place one process among the `count` of its task."""
    return {
        "FEDLLM_PROCESSES": str(count),
        "FEDLLM_RANK": str(rank),
        "FEDLLM_LOCAL_RANK": str(rank),
        "FEDLLM_RENDEZVOUS": rendezvous,
    }


def _log(pattern: str, rank: int) -> str:
    """Return the log of a process: its rank replaces `%t` in the name of the file, as in srun."""
    folder, slash, name = pattern.rpartition("/")
    return f"{folder}{slash}{name.replace('%t', str(rank))}"


def _moment(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _local_task() -> str:
    pid = os.getpid()
    return f"local:{socket.gethostname()}:{pid}:{process_start_time(pid) or ''}"
