"""Ids of array tasks as Slurm writes them: `7_3`, `7_[0-2,5%8]`. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

_ARRAY_ID = re.compile(r"(\d+)_(?:(\d+)|\[([\d,-]+)(?:%\d+)?\])")


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
