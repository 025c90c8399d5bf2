"""How users write sbatch options: the names of flags, and times."""

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_NO_LIMIT = {"", "0", "-1", "UNLIMITED", "INFINITE", "NONE", "N/A", "NOT_SET", "PARTITION_LIMIT"}


def flag_name(key: str) -> str:
    """Return the long flag of an option as users write it: `cpus_per_task`, `--cpus-per-task`."""
    return key.strip().removeprefix("--").replace("_", "-")


def by_flag(options: Mapping[str, Value]) -> dict[str, Value]:
    """Return options by their long flags, however the user wrote them."""
    return {flag_name(key): value for key, value in options.items()}


def time_minutes(time: object) -> float | None:
    """Return the minutes of a time limit; None: there is none.

    Slurm writes and takes minutes, `minutes:seconds`, `hours:minutes:seconds`, `days-hours`,
    `days-hours:minutes` and `days-hours:minutes:seconds`.

    Raises:
        ValueError: it is none of these.
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
