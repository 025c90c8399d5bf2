"""Notations of Slurm: task ids (`7_[0-2,5%8]`), sizes, lists of hosts, rows of tables. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fedllm.scheduling.slurm.command_output import rows_of

_ARRAY_ID = re.compile(r"(\d+)_(?:(\d+)|\[([\d,-]+)(?:%\d+)?\])")
_UNITS = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
_SETTING = re.compile(r"(\w+(?:\[\d+\])?)\s*= ?(.*)")
# a comma inside `n[1,2]` or `gpu:2(IDX:0,1)` does not separate
_COMMA = re.compile(r",(?![^\[]*\])(?![^(]*\))")


def rows(output: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the rows of a table with `|` between its columns, or behind each."""
    for values in rows_of(output, len(columns)):
        yield dict(zip(columns, values, strict=True))


def settings(output: str) -> dict[str, str]:
    """Return the settings `Key    = value` of `scontrol show config`."""
    matches = (_SETTING.fullmatch(line.strip()) for line in output.splitlines())
    return {match[1]: match[2] for match in matches if match}


def version(configuration: Mapping[str, str]) -> str:
    """Return Slurm's version from the settings of `scontrol show config`."""
    return configuration.get("SLURM_VERSION", "of unknown version")


def entities(output: str, name: str) -> dict[str, dict[str, str]]:
    """Return the settings of each line of `scontrol --oneliner show`, by the value of `name=`."""
    found = {}
    for line in output.splitlines():
        words = dict(word.partition("=")[::2] for word in line.split())
        if line.lstrip().startswith(f"{name}=") and words[name]:
            found[words[name]] = words
    return found


def mebibytes(text: object) -> float:
    """Return a size of memory in MiB, from sbatch's form: `4000`, `4000M`, `4G`.

    Raises:
        ValueError: the text is no size.
    """
    match = re.fullmatch(r"([\d.]+)([KMGT]?)B?", str(text).strip().upper())
    if match is None:
        raise ValueError(f"not a size of memory: {text}")
    return float(match[1]) * _UNITS[match[2] or "M"]


def number(text: str) -> int | None:
    """Return a limit on a count; None: no limit."""
    return int(text) if text.isdecimal() else None


def separated(text: str) -> list[str]:
    """Return the parts of a list between commas outside of brackets and parentheses."""
    return [part for part in _COMMA.split(text) if part and part != "(null)"]


def hosts(text: str) -> set[str]:
    """Return the host names that a list such as `n[1-3,07],login` stands for."""
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
    """Return the amounts of a list such as `cpu=64,mem=1T,gres/gpu=8` by name, memory in MiB."""
    found = {}
    for part in separated(text):
        name, _, value = part.partition("=")
        try:
            found[name] = mebibytes(value) if name == "mem" else float(value)
        except ValueError:
            continue
    return found


def generic(text: str, kind: str = "gpu") -> dict[str, int]:
    """Return the counts of a generic resource, by type ("": any), from `gpu:a100:4(S:0-1),gpu:2`.

    Raises:
        ValueError: a count is no number.
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
    """Return the task ids that `7_3` or `7_[0-2,5%8]` stands for."""
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
    """Return the array ids of tasks, each once, in the order of the tasks."""
    return list(dict.fromkeys(task.partition("_")[0] for task in ids))


def named(name: str, lines: Iterable[str]) -> list[str]:
    """Return the ids of the lines `id|name` with this name.

    Slurm's own filter would split a name at its commas.
    """
    parts = (line.partition("|") for line in lines)
    return [id_.strip() for id_, _, other in parts if other == name]


def whole_arrays(listed: Iterable[str]) -> list[str]:
    """Return all tasks of the listed arrays, from 0 on: Slurm may have forgotten some."""
    tasks = [task for id_ in listed for task in tasks_of(id_)]
    return [
        f"{array}_{number}"
        for array, numbers in sorted(_numbers(tasks).items())
        for number in range(max(numbers) + 1)
    ]


def expressions(ids: Sequence[str]) -> list[str]:
    """Return tasks in scancel's form, one word per array: `7_[0,1,4]`."""
    return [
        f"{array}_[{','.join(map(str, sorted(set(numbers))))}]"
        for array, numbers in _numbers(ids).items()
    ]
