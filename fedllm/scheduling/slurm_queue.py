"""What Slurm says about our jobs: few questions, cached answers, and never the truth about work."""

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from fedllm.scheduling.seam import Ending, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm_commands import CommandRefused, Commands, InstalledCommands

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ARRAY_ID = re.compile(r"(\d+)_(?:(\d+)|\[([\d,-]+)(?:%\d+)?\])")
_MOST_BACKOFF = 8
_ACCOUNTING_WINDOW = "now-7days"


class Queue:
    """Slurm's answers about the tasks of this user.

    Args:
        query_seconds: the least time between two questions for states; failures double it.
        commands: Slurm's.
    """

    def __init__(self, *, query_seconds: float, commands: Commands) -> None:
        self._commands = commands
        self._query_seconds = query_seconds
        self._next_query = float("-inf")
        self._failures = 0
        self._listed: dict[str, TaskState] | None = None
        self._submitted_since: set[str] = set()
        self._endings: dict[str, Ending] = {}
        self._waiting_for: dict[str, str] = {}

    def expect(self, ids: Iterable[str]) -> None:
        """Remember tasks that the last answer cannot know yet: they are not gone."""
        self._submitted_since.update(ids)

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return what is known of every task.

        Before Slurm has answered once, and after it failed to, that is UNKNOWN: never GONE.
        """
        if self._commands.monotonic() >= self._next_query:
            self._ask()
        if self._listed is None:
            return dict.fromkeys(ids, TaskState.UNKNOWN)
        absent = dict.fromkeys(self._submitted_since, TaskState.WAITING)
        return {task: self._listed.get(task) or absent.get(task) or TaskState.GONE for task in ids}

    def _ask(self) -> None:
        try:
            lines = squeue("-o", "%i|%T|%r", commands=self._commands).splitlines()
        except (SchedulerUnreachable, CommandRefused):
            self._failures += 1
            self._listed = None
        else:
            self._failures = 0
            self._submitted_since.clear()
            self._listed = {}
            self._waiting_for = {}
            for line in lines:
                task, state, reason = line.split("|", 2)
                waits = state in _WAITING
                self._listed[task] = TaskState.WAITING if waits else TaskState.RUNNING
                if waits:
                    self._waiting_for[task] = reason
        backoff = min(2**self._failures, _MOST_BACKOFF)
        self._next_query = self._commands.monotonic() + self._query_seconds * backoff

    def find(self, name: str) -> list[str] | None:
        """Return the tasks of the arrays named `name`, or None if Slurm knows of none.

        Slurm forgets ended jobs after minutes (MinJobAge); the accounting, where there is one,
        does not.

        Raises:
            SchedulerUnreachable: slurmctld cannot be asked now.
        """
        try:
            said = squeue("-t", "all", "-o", "%i|%j", commands=self._commands)
        except CommandRefused as error:
            raise SchedulerUnreachable(f"squeue: {error}") from error
        listed = named(name, said)
        if not listed:
            words = (f"--name={name}", f"--user={os.getuid()}", "-o", "JobID,JobName")
            listed = named(name, _accounting(*words, commands=self._commands))
        ids = _whole_arrays(listed)
        self.expect(ids)
        return ids or None

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended that failed, as far as Slurm or its accounting still knows."""
        for ask in (_endings_in_queue, _endings_in_accounting):
            unknown = [task for task in ids if task not in self._endings]
            if unknown:
                arrays = ",".join(dict.fromkeys(task.partition("_")[0] for task in unknown))
                self._endings |= ask(arrays, self._commands)
        found = {task: self._endings[task] for task in ids if task in self._endings}
        return {task: ending for task, ending in found.items() if ending.state != "COMPLETED"}

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Return why tasks wait, from the last answer about states."""
        return {task: self._waiting_for[task] for task in ids if task in self._waiting_for}

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks; those that are gone are passed over.

        Raises:
            SchedulerUnreachable: slurmctld cannot be asked now.
        """
        if not ids:
            return
        # refused for a task that ended meanwhile; whoever needs certainty asks for states
        with contextlib.suppress(CommandRefused):
            self._commands.call(["scancel", "--quiet", *_expressions(ids)])


def squeue(*words: str, commands: Commands | None = None) -> str:
    """Ask for jobs of this user, one line per array task.

    Raises:
        SchedulerUnreachable: slurmctld cannot be asked now.
        CommandRefused: it knows nothing of what was asked for.
    """
    ask = (commands or InstalledCommands()).call
    return ask(["squeue", "--noheader", "--array", f"--user={os.getuid()}", *words])


def _accounting(*words: str, commands: Commands) -> str:
    """Ask the accounting; a site without one, or one that does not answer, knows nothing."""
    words = ("--starttime", _ACCOUNTING_WINDOW, *words)
    try:
        return commands.call(["sacct", "--noheader", "--parsable2", "--allocations", *words])
    except (CommandRefused, SchedulerUnreachable):
        return ""


def _endings_in_queue(arrays: str, commands: Commands) -> dict[str, Ending]:
    fields = "JobArrayID:|,State:|,exit_code:|,NodeList:|"
    try:
        said = squeue("-t", "all", f"--jobs={arrays}", "-O", fields, commands=commands)
    except (CommandRefused, SchedulerUnreachable):
        return {}
    endings = {}
    for line in said.splitlines():
        task, state, status, node = line.split("|")[:4]
        if state not in _WAITING | {"RUNNING", "COMPLETING"}:
            code = f"{int(status) >> 8}:{int(status) & 127}"
            endings[task] = _ending(state, code, node)
    return endings


def _endings_in_accounting(arrays: str, commands: Commands) -> dict[str, Ending]:
    # --duplicates: also the earlier starts of a requeued task; the last line is the last start
    words = ("--duplicates", f"--jobs={arrays}", "-o", "JobID,State,ExitCode,NodeList")
    said = _accounting(*words, commands=commands)
    endings = {}
    for line in said.splitlines():
        task, state, code, node = line.split("|")[:4]
        if state not in _WAITING | {"RUNNING"}:
            for each in _tasks_of(task):
                endings[each] = _ending(state, code, node)
    return endings


def _ending(state: str, code: str, node: str) -> Ending:
    # accounting says by whom: `CANCELLED by 1000`
    place = node if node != "None assigned" else ""
    return Ending(state=state.partition(" ")[0], exit_code=code, node=place)


def _tasks_of(listed: str) -> list[str]:
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


def named(name: str, said: str) -> list[str]:
    """Return the ids of the lines `id|name`; Slurm's own filter splits names at commas."""
    lines = (line.partition("|") for line in said.splitlines())
    return [id_.strip() for id_, _, other in lines if other == name]


def _whole_arrays(listed: Iterable[str]) -> list[str]:
    """Return all tasks of the listed arrays, also those that Slurm already forgot: from 0 on."""
    tasks = [task for id_ in listed for task in _tasks_of(id_)]
    return [
        f"{array}_{number}"
        for array, numbers in sorted(_numbers(tasks).items())
        for number in range(max(numbers) + 1)
    ]


def _expressions(ids: Sequence[str]) -> list[str]:
    """Return tasks as scancel takes them in one word per array: `7_[0,1,4]`."""
    return [
        f"{array}_[{','.join(map(str, sorted(set(numbers))))}]"
        for array, numbers in _numbers(ids).items()
    ]
