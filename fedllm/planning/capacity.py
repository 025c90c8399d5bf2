"""What a scheduler has room for."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What there is room for, for tasks of certain options.

    Attributes:
        free_slots: tasks that could start now.
        most_parallel: tasks that may run at once.
        largest_array: tasks that one array may have.
        free_tasks: tasks that may be submitted now; None: no limit is known.
        most_minutes: the longest time limit; None: none is known.
        resident: workers that are there anyway, whatever there is to do.
    """

    free_slots: int
    most_parallel: int
    largest_array: int
    free_tasks: int | None = None
    most_minutes: float | None = None
    resident: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a scheduler allows to be submitted; None: no limit is known.

    Attributes:
        largest_array: tasks that one array may have.
        most_submitted: tasks that may wait and run at a time.
        problem: why nothing is known; else empty.
    """

    largest_array: int | None = None
    most_submitted: int | None = None
    problem: str = ""
