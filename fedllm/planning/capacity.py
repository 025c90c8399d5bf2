"""How many tasks a scheduler can take, now and at most."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskSize:
    """Size of a task: so many processes, spread evenly over so many nodes."""

    processes: int = 1
    nodes: int = 1


ONE_PROCESS = TaskSize()


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The tasks of certain options that a scheduler can take.

    Attributes:
        free_slots: tasks that could start now.
        max_parallel: tasks that may run at once.
        largest_array: tasks that one array may have.
        free_tasks: tasks that may be submitted now; None: no limit is known.
        max_minutes: the longest time limit; None: no limit is known.
        resident: the workers stay for the whole run, even without tasks.
    """

    free_slots: int
    max_parallel: int
    largest_array: int
    free_tasks: int | None = None
    max_minutes: float | None = None
    resident: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits on what may be submitted to a scheduler; None: no limit is known.

    Attributes:
        largest_array: tasks that one array may have.
        max_submitted: tasks that may wait and run at a time.
        problem: why no limit could be read; empty where they were read.
    """

    largest_array: int | None = None
    max_submitted: int | None = None
    problem: str = ""
