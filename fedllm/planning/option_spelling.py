"""Options of jobs as users write them: names and time limits."""

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

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

_NO_LIMIT = {"", "0", "-1", "UNLIMITED", "INFINITE", "NONE", "N/A", "NOT_SET", "PARTITION_LIMIT"}


def flag_name(key: str) -> str:
    """Return the long flag of an option as users write it: `cpus_per_task`, `-c`, `c`."""
    name = key.strip().lstrip("-").replace("_", "-")
    return _LONG.get(name, name)


def by_flag(options: Mapping[str, Value]) -> dict[str, Value]:
    """Return options by long flag, in whatever form the user wrote them."""
    return {flag_name(key): value for key, value in options.items()}


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
