"""Slurm's commands, called in a clean environment; each kind of failure is its own exception.

The list has every command that fedllm calls, and the form of its answer. Other lines are ignored:
squeue's answers begin with `command_output.MARK`, or with an unused column that an announcement
may run into:

    sbatch FILE                                        `Submitted batch job 7`, `7`, `7;cluster`
    sbatch --test-only --OPTION=VALUE ... --array=0-0 --wrap=true      exit status alone
    squeue --noheader --array -t all ...               one line per array task, ended ones too
        --user=UID or --jobs=7,8 -o QUEUE_COLUMNS      `7_3|PENDING|lab|normal|low|Priority`
        -o MARK%i|%j                                   `7_3|name`
        --jobs=7,8 -O UserName:|,JobArrayID:|,State:|,exit_code:|,NodeList:|
    sacct --noheader --parsable2 --allocations --starttime now-7days ...
        --name=NAME --allusers -o User,JobID,JobName   `me|7_3|name` or `me|7_[4-9%2]|name`
        --allusers --jobs=7,8 -o User,JobID,State      `other|7_3|RUNNING`
        --duplicates --jobs=7,8 -o User,JobID,State,ExitCode,NodeList
    scontrol --oneliner show job 7                     exit status; whether it knows the id
    scancel --quiet [--state=PENDING] 7_[0,1,4]
    scontrol show config                               `MaxArraySize            = 1001`
    scontrol --all --oneliner show partition           `PartitionName=low ... MaxTime=UNLIMITED`
    sinfo --noheader --Node --partition=low -O ...     nodes.NODE_COLUMNS, each `NAME:|`
    sacctmgr --noheader --parsable2 show ... format=   limits.*_COLUMNS; only where
        user name=ME cluster=C withassoc               AccountingStorageEnforce says more than none
        assoc user= cluster=C
        qos
"""

import errno
import os
import subprocess
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedllm.errors import UserError
from fedllm.scheduling.job_variables import travels
from fedllm.scheduling.seam import SchedulerFull, SchedulerUnreachable
from fedllm.scheduling.slurm.command_output import excerpt, submitted_job

COMMAND_TIMEOUT_SECONDS = 120

# Variables that a launcher of several processes, or fedllm itself, set for this job alone.
_OWN = {
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("FEDLLM_TASK", "FEDLLM_LOG", "FEDLLM_PROCESSES", "FEDLLM_PYTHON", "FEDLLM_SETUP"),
    *("FEDLLM_RANK", "FEDLLM_LOCAL_RANK", "FEDLLM_RENDEZVOUS", "FEDLLM_RENEWED_AT"),
}
# the node's name in a shell that Slurm started: virtual nodes of one host share the host name
NODE_NAME_IN_SHELL = "${SLURMD_NODENAME:-$(hostname)}"
# defaults of a site or user, which hold where the configuration says nothing
_SITE_DEFAULTS = ("account", "partition", "qos", "reservation", "constraint")

_TRANSIENT = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "communication connection failure",
    "communication shutdown",
    "zero bytes were transmitted",
    "backup controller",
    "temporarily unable",
    "temporarily unavailable",
    "connection timed out",
    "transport endpoint is not connected",
    "message receive failure",
    "unexpected message received",
    "protocol authentication error",
    "slurmdbd",
)
# What sbatch prints at MaxJobCount; it sleeps and retries, then gives up.
_NO_ROOM = (
    "unable to accept job",
    "job queue full",
    "job creation temporarily disabled",
    "unable to create job record",
    "resource temporarily unavailable",
)
# no process can be started now
_NO_PROCESS = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}
_NO_CLUSTER = ("configuration source", "unable to process configuration file")


class CommandRefused(Exception):
    """A command that Slurm refused; the message is Slurm's, in one line."""


class Commands(Protocol):
    """Slurm's commands and a clock."""

    def call(self, words: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
        """Run a command and return its output; the errors are those of `call`."""

    def monotonic(self) -> float:
        """Return the seconds of a clock that never goes back."""

    def sleep(self, seconds: float) -> None:
        """Wait for `seconds`."""


@dataclass(frozen=True, kw_only=True)
class InstalledCommands:
    """Slurm's commands in PATH, and this machine's clock."""

    timeout_seconds: float = COMMAND_TIMEOUT_SECONDS

    def call(self, words: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
        """Run a command and return its output; the errors are those of `call`."""
        return call(words, environment=environment, timeout_seconds=self.timeout_seconds)

    def monotonic(self) -> float:
        """Return this machine's monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`."""
        time.sleep(seconds)


class QueryPace:
    """A limit on the rate of calls: at most `max_calls` within any `seconds`."""

    def __init__(self, *, max_calls: int, seconds: float, commands: Commands) -> None:
        self._seconds = seconds
        self._commands = commands
        self._passed: deque[float] = deque(maxlen=max_calls)

    def wait(self) -> None:
        """Wait until one more call is allowed."""
        if len(self._passed) == self._passed.maxlen:
            early = self._passed[0] + self._seconds - self._commands.monotonic()
            if early > 0:
                self._commands.sleep(early)
        self._passed.append(self._commands.monotonic())


def clean_environment(
    given: Mapping[str, str] | None = None, *, configured: Collection[str] = ()
) -> dict[str, str]:
    """Return an environment for a Slurm command, the same inside a job as outside.

    Jobs inherit it, so it has only variables that their programs need. Those of a Slurm job that
    this process runs in are not among them: CPU binding, array ids, formats of squeue.

    Args:
        given: the environment to clean; None: that of this process.
        configured: sbatch options that are given explicitly. A default of the same option in the
            environment (`SBATCH_ACCOUNT`) would win over the file, so it is dropped.
    """
    given = os.environ if given is None else given
    kept = {f"SBATCH_{option.upper()}" for option in _SITE_DEFAULTS if option not in configured}
    kept |= {"SLURM_CONF", "SLURM_CONF_SERVER"}
    return {
        name: value
        for name, value in given.items()
        if name in kept or (travels(name, value) and name not in _OWN)
    }


def srun_environment(configured: Collection[str]) -> dict[str, str]:
    """Return the environment of srun, where the defaults of sbatch have srun's names."""
    kept = clean_environment(configured=configured)
    return {
        name.replace("SBATCH_", "SLURM_", 1) if name.startswith("SBATCH_") else name: value
        for name, value in kept.items()
    }


def call(
    words: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = COMMAND_TIMEOUT_SECONDS,
) -> str:
    """Run a Slurm command and return its output.

    Raises:
        UserError: the command is not installed, or finds no cluster.
        SchedulerFull: sbatch found no room for one more job in the whole cluster.
        SchedulerUnreachable: Slurm does not answer now.
        CommandRefused: Slurm refused.
    """
    try:
        done = subprocess.run(
            list(words),
            env=clean_environment() if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{words[0]}: not found; scheduler.kind slurm needs Slurm's commands in PATH, "
            "scheduler.kind local does not"
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if error.errno in _NO_PROCESS:
            raise SchedulerUnreachable(f"{words[0]}: {reason}") from error
        raise UserError(f"{words[0]}: cannot be started here ({reason})") from error
    except subprocess.TimeoutExpired as error:
        # without room sbatch tries again for minutes
        output = bytes(error.stderr or b"").decode(errors="replace")
        if any(text in output.lower() for text in _NO_ROOM):
            raise SchedulerFull(f"{words[0]}: {_one_line(words[0], output)}") from error
        raise SchedulerUnreachable(
            f"{words[0]}: no answer within {timeout_seconds:.0f} s; is slurmctld overloaded?"
        ) from error
    if done.returncode == 0:
        return done.stdout
    raise _failure(words[0], done.stderr or done.stdout, done.returncode)


def squeue(*words: str, commands: Commands | None = None) -> str:
    """Return squeue's output, one line per array task of any user, ended ones too.

    Raises:
        SchedulerUnreachable: slurmctld does not answer now.
        CommandRefused: squeue knows none of the jobs.
    """
    run = (commands or InstalledCommands()).call
    return run(["squeue", "--noheader", "--array", "-t", "all", *words])


def unknown_submission(name: str, output: str) -> str:
    """Return the error for a job that neither sbatch's output nor the queue names."""
    answer = submitted_job(output)
    if answer and answer.cluster:
        return (
            f"sbatch: job {answer.job} went to cluster {answer.cluster}, and the queue here has no "
            f"job {name}; start fedllm on a host of {answer.cluster}, or keep sbatch from sending "
            f"jobs there; scancel --clusters={answer.cluster} {answer.job} ends it"
        )
    return (
        f"sbatch: its answer names no job ({excerpt(output)}), and the queue has no job {name}; "
        "have sbatch say `Submitted batch job N` or the number alone, then `fedllm resume` looks "
        "again"
    )


def _failure(command: str, output: str, status: int) -> Exception:
    message = _one_line(command, output) or f"exit status {status}"
    folded = message.lower()
    if any(text in folded for text in _NO_CLUSTER):
        return UserError(
            f"{command}: {message}; set SLURM_CONF or start from a host of the cluster"
        )
    if command == "sbatch" and any(text in folded for text in _NO_ROOM):
        return SchedulerFull(f"{command}: {message}")
    if any(text in folded for text in _TRANSIENT) or status < 0:
        return SchedulerUnreachable(f"{command}: {message}")
    return CommandRefused(message)


def _one_line(command: str, output: str) -> str:
    """Return a command's output in one line, without its name and hints."""
    lines = [line.strip() for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Try ")]
    for prefix in (f"{command}: ", "error: ", "fatal: "):
        lines = [line.removeprefix(prefix) for line in lines]
    return "; ".join(dict.fromkeys(lines))
