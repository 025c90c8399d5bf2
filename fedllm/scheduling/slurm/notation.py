"""Slurm's notations: task ids (`7_[0-2,5%8]`), sizes, lists of hosts, rows of tables. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fedllm.scheduling.slurm.command_output import rows_of

_ARRAY_ID = re.compile(r"(\d+)_(?:(\d+)|\[([\d,-]+)(?:%\d+)?\])")
_UNITS = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
_SETTING = re.compile(r"(\w+(?:\[\d+\])?)\s*= ?(.*)")
# the comma of `n[1,2]` and of `gpu:2(IDX:0,1)` separates nothing
_COMMA = re.compile(r",(?![^\[]*\])(?![^(]*\))")


def rows(said: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Return the lines of a table with `|` between its columns, or behind each."""
    for values in rows_of(said, len(columns)):
        yield dict(zip(columns, values, strict=True))


def settings(said: str) -> dict[str, str]:
    """Return the lines `Key    = value` of `scontrol show config`."""
    found = (_SETTING.fullmatch(line.strip()) for line in said.splitlines())
    return {match[1]: match[2] for match in found if match}


def version(configuration: Mapping[str, str]) -> str:
    """Return Slurm's version from the lines of `scontrol show config`."""
    return configuration.get("SLURM_VERSION", "of unknown version")


def entities(said: str, name: str) -> dict[str, dict[str, str]]:
    """Return the lines of `scontrol --oneliner show` that begin with `name=`, by its value."""
    found = {}
    for line in said.splitlines():
        words = dict(word.partition("=")[::2] for word in line.split())
        if line.lstrip().startswith(f"{name}=") and words[name]:
            found[words[name]] = words
    return found


def mebibytes(text: object) -> float:
    """Return a size as sbatch takes it: `4000`, `4000M`, `4G`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"([\d.]+)([KMGT]?)B?", str(text).strip().upper())
    if match is None:
        raise ValueError(f"not a size of memory: {text}")
    return float(match[1]) * _UNITS[match[2] or "M"]


def number(text: str) -> int | None:
    """Return a limit on a count; None: there is none."""
    return int(text) if text.isdecimal() else None


def separated(text: str) -> list[str]:
    """Return the parts of a list, outside of brackets and parentheses."""
    return [part for part in _COMMA.split(text) if part and part != "(null)"]


def hosts(text: str) -> set[str]:
    """Return the names that `n[1-3,07],login` stands for."""
    return {name for part in separated(text) for name in _expanded(part)}


def _expanded(part: str) -> Iterator[str]:
    match = re.fullmatch(r"([^\[]*)\[([\d,-]+)\](.*)", part)
    if match is None:
        yield part
        return
    for bounds in match[2].split(","):
        first, _, last = bounds.partition("-")
        for value in range(int(first), int(last or first) + 1):
            yield from _expanded(f"{match[1]}{value:0{len(first)}d}{match[3]}")


def counts(text: str) -> dict[str, float]:
    """Return `cpu=64,mem=1T,gres/gpu=8` by name, memory in MiB."""
    found = {}
    for part in separated(text):
        name, _, value = part.partition("=")
        try:
            found[name] = mebibytes(value) if name == "mem" else float(value)
        except ValueError:
            continue
    return found


def generic(text: str, kind: str = "gpu") -> dict[str, int]:
    """Return how many of a generic resource `gpu:a100:4(S:0-1),gpu:2` tells, by type ("": any).

    Raises:
        ValueError: a count is none.
    """
    found: dict[str, int] = {}
    for part in separated(text):
        name, *rest = part.partition("(")[0].replace("=", ":").removeprefix("gres/").split(":")
        if name == kind:
            value = rest.pop() if rest and rest[-1].isdecimal() else "1"
            type_ = rest[0] if rest else ""
            found[type_] = found.get(type_, 0) + int(value)
    return found


def tasks_of(listed: str) -> list[str]:
    """Return the tasks that `7_3` or `7_[0-2,5%8]` stands for."""
    match = _ARRAY_ID.fullmatch(listed)
    if match is None:
        return []
    array, single, ranges = match.groups()
    if single is not None:
        return [f"{array}_{single}"]
    bounds = [part.partition("-") for part in ranges.split(",")]
    return [
        f"{array}_{number}"
        for first, _, last in bounds
        for number in range(int(first), int(last or first) + 1)
    ]


def _numbers(ids: Iterable[str]) -> dict[int, list[int]]:
    """Return the task numbers of every array."""
    numbers: dict[int, list[int]] = defaultdict(list)
    for task in ids:
        array, _, number = task.partition("_")
        numbers[int(array)].append(int(number))
    return numbers


def arrays_of(ids: Iterable[str]) -> list[str]:
    """Return the arrays of tasks, each once, in the order of the tasks."""
    return list(dict.fromkeys(task.partition("_")[0] for task in ids))


def named(name: str, lines: Iterable[str]) -> list[str]:
    """Return the ids of the lines `id|name`; Slurm's own filter splits names at commas."""
    parts = (line.partition("|") for line in lines)
    return [id_.strip() for id_, _, other in parts if other == name]


def whole_arrays(listed: Iterable[str]) -> list[str]:
    """Return all tasks of the listed arrays, also those that Slurm already forgot: from 0 on."""
    tasks = [task for id_ in listed for task in tasks_of(id_)]
    return [
        f"{array}_{number}"
        for array, numbers in sorted(_numbers(tasks).items())
        for number in range(max(numbers) + 1)
    ]


def expressions(ids: Sequence[str]) -> list[str]:
    """Return tasks as scancel takes them in one word per array: `7_[0,1,4]`."""
    return [
        f"{array}_[{','.join(map(str, sorted(set(numbers))))}]"
        for array, numbers in _numbers(ids).items()
    ]
