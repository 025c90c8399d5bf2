"""sbatch options as users write them: flag names, times, and options that fedllm sets itself."""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# Processes of a task.
PROCESSES = 1

# sbatch(1): one-letter options
_LONG = {
    **{"A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint"},
    **{"c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile"},
    **{"G": "gpus", "H": "hold", "h": "help", "i": "input", "J": "job-name", "k": "no-kill"},
    **{"L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks"},
    **{"O": "overcommit", "o": "output", "p": "partition", "Q": "quiet", "q": "qos"},
    **{"S": "core-spec", "s": "oversubscribe", "t": "time", "V": "version", "v": "verbose"},
    **{"W": "wait", "w": "nodelist", "x": "exclude"},
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")

_ONE_PROCESS = (
    "a task is one process; scheduler.max_parallel says how many tasks run at once, cpus-per-task "
    "how many CPUs each has"
)
_ANSWER = "the job's id is read from what sbatch says"
# Options that fedllm sets itself, each with the reason: they define tasks, or how jobs are found.
_OWNED = {
    "array": "the number of tasks and scheduler.max_parallel decide it",
    "chdir": "jobs start where fedllm was started; give --run-dir for another place",
    "cluster-constraint": "jobs of another cluster cannot be seen from here",
    "clusters": "jobs of another cluster cannot be seen from here; start fedllm on a host there",
    "dependency": "the records of the run decide what comes after what",
    "error": "logs lie in the run directory",
    "gid": "jobs belong to who submits them",
    "help": "nothing would run",
    "input": "programs read no standard input",
    "job-name": "names find submissions again",
    "nodes": "a task is one process on one node",
    "ntasks": _ONE_PROCESS,
    "ntasks-per-core": _ONE_PROCESS,
    "ntasks-per-gpu": _ONE_PROCESS,
    "ntasks-per-node": _ONE_PROCESS,
    "ntasks-per-socket": _ONE_PROCESS,
    "open-mode": "a task that is requeued goes on in its log",
    "output": "logs lie in the run directory",
    "parsable": _ANSWER,
    "quiet": _ANSWER,
    "test-only": "nothing would run",
    "uid": "jobs belong to who submits them",
    "usage": "nothing would run",
    "version": "nothing would run",
    "wait": "sbatch has to answer at once",
    "wrap": "tasks run programs of fedllm",
}
# Values that change nothing: fedllm sets them too.
_HARMLESS = {
    "nodes": {"1", "1-1"},
    "ntasks": {str(PROCESSES)},
    "ntasks-per-core": {"1"},
    "ntasks-per-node": {str(PROCESSES)},
    "ntasks-per-socket": {"1"},
    "open-mode": {"append"},
}

_NO_LIMIT = {"", "0", "-1", "UNLIMITED", "INFINITE", "NONE", "N/A", "NOT_SET", "PARTITION_LIMIT"}


def flag_name(key: str) -> str:
    """Return the long flag of an option as users write it: `cpus_per_task`, `-c`, `c`."""
    name = key.strip().lstrip("-").replace("_", "-")
    return _LONG.get(name, name)


def by_flag(options: Mapping[str, Value]) -> dict[str, Value]:
    """Return options by long flag, in whatever form the user wrote them."""
    return {flag_name(key): value for key, value in options.items()}


def refusal_reason(name: str, value: object) -> str | None:
    """Return why users may not set an option; None: they may.

    Shortened names are refused too, as sbatch accepts them: `ntasks-per-no`.
    """
    if not _NAME.fullmatch(name):
        return "not the name of an sbatch option; write name: value, and true for a flag alone"
    if "\n" in str(value) or "\r" in str(value):
        return "an option is one line; remove the line break"
    if value is None or value is False or str(value) in _HARMLESS.get(name, ()):
        return None
    full = name if name in _OWNED else next((o for o in _OWNED if o.startswith(name)), None)
    return None if full is None else f"got {value}; fedllm sets it ({_OWNED[full]}); remove it"


def time_minutes(time: object) -> float | None:
    """Return the minutes of a time limit; None: there is no limit.

    Slurm's forms are minutes, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`,
    `days-hours:minutes` and `days-hours:minutes:seconds`.

    Raises:
        ValueError: the time has another form.
    """
    text = str(time).strip()
    if text.upper() in _NO_LIMIT:
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) > 3:
        raise ValueError(f"not a time limit: {text}")
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60
