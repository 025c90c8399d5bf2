"""Slurm's queue of our tasks: few queries, cached answers. Records, not Slurm, say what is done."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from fedllm.planning.backoff import Backoff
from fedllm.scheduling.seam import Ending, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm.command_output import MARK, marked_lines, rows_of
from fedllm.scheduling.slurm.commands import CommandRefused, Commands, squeue
from fedllm.scheduling.slurm.limits import Place
from fedllm.scheduling.slurm.notation import expressions, named, whole_arrays
from fedllm.scheduling.slurm.states import state_in_queue
from fedllm.scheduling.slurm.task_endings import Endings

_MAX_PAUSE = 8  # times `query_seconds`


class Queue:
    """The queue of this user's tasks, from Slurm's cached answers.

    Args:
        query_seconds: the minimum time between two queries of states; each failure doubles it.
        commands: Slurm's commands.
    """

    def __init__(self, *, query_seconds: float, commands: Commands) -> None:
        self._commands = commands
        self._pause = Backoff(query_seconds, max_seconds=_MAX_PAUSE * query_seconds)
        self._next_query = float("-inf")
        self._listed: dict[str, TaskState] | None = None
        self._submitted_since: set[str] = set()
        self._waiting_for: dict[str, str] = {}
        self._places: Counter[Place] = Counter()
        self._last_states: tuple[list[str], dict[str, TaskState]] = [], {}
        self._trouble: str | None = None
        self._ended = Endings(query_seconds=query_seconds, commands=commands)

    def expect(self, ids: Iterable[str]) -> None:
        """Remember tasks that were submitted after the last answer: they are not gone."""
        self._last_states = [], {}
        self._submitted_since.update(ids)

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the state of every task.

        It is UNKNOWN, never GONE, before Slurm's first answer and after a query that failed.
        """
        self._ask_if_due()
        if self._listed is None:
            return dict.fromkeys(ids, TaskState.UNKNOWN)
        requested = [*ids]
        # callers ask about the same tasks again and again; the answer changes once a minute
        if requested != self._last_states[0]:
            known = {**dict.fromkeys(self._submitted_since, TaskState.WAITING), **self._listed}
            gone = TaskState.GONE
            self._last_states = requested, {task: known.get(task, gone) for task in requested}
        return dict(self._last_states[1])

    def queued(self, *, fresh: bool = False) -> Counter[Place] | None:
        """Return how many tasks of this user wait or run in each place; None: unknown.

        Tasks submitted since the last answer count for the empty place.
        """
        if fresh:
            self._next_query = float("-inf")
        self._ask_if_due()
        if self._listed is None:
            return None
        unplaced = len(self._submitted_since - self._listed.keys())
        return self._places + Counter({Place(): unplaced})

    def trouble(self) -> str | None:
        """Return why states are unknown now; None: they are known."""
        return self._trouble

    def _ask_if_due(self) -> None:
        now = self._commands.monotonic()
        if now < self._next_query:
            return
        try:
            output = squeue("-o", f"{MARK}%i|%T|%a|%q|%P|%r", commands=self._commands)
        except (SchedulerUnreachable, CommandRefused) as error:
            self._pause.fail()
            self._listed = None
            self._trouble = (
                f"Slurm does not answer ({error}); asking again in {self._pause.seconds:.0f} s"
            )
        else:
            self._pause.succeed()
            self._trouble = None
            self._read(marked_lines(output))
        self._next_query = self._commands.monotonic() + self._pause.seconds

    def _read(self, lines: Sequence[str]) -> None:
        self._submitted_since.clear()
        self._last_states = [], {}
        self._waiting_for = {}
        self._places.clear()
        # most lines differ only in the task
        tasks_by_rest: dict[str, list[str]] = defaultdict(list)
        for line in lines:
            task, _, rest = line.partition("|")
            tasks_by_rest[rest].append(task)
        self._listed = {}
        for rest, tasks in tasks_by_rest.items():
            state, account, qos, partition, reason = rest.split("|", 4)
            known = state_in_queue(state)
            self._listed |= dict.fromkeys(tasks, known)
            self._places[Place(account=account, qos=qos, partition=partition)] += len(tasks)
            if known is TaskState.WAITING:
                self._waiting_for |= dict.fromkeys(tasks, reason)

    def find(self, name: str) -> list[str] | None:
        """Return the tasks of the arrays named `name`, or None if Slurm knows of none.

        Slurm forgets ended jobs after minutes (MinJobAge); its accounting, if there is one, does
        not.

        Raises:
            SchedulerUnreachable: slurmctld does not answer now.
        """
        try:
            output = squeue("-t", "all", "-o", f"{MARK}%i|%j", commands=self._commands)
        except CommandRefused as error:
            raise SchedulerUnreachable(f"squeue: {error}") from error
        listed = named(name, marked_lines(output))
        if not listed:
            words = (f"--name={name}", f"--user={os.getuid()}", "-o", "User,JobID,JobName")
            output = self._ended.accounting(*words)
            listed = named(name, (f"{id_}|{other}" for _, id_, other in rows_of(output, 3)))
        ids = whole_arrays(listed)
        self.expect(ids)
        return ids or None

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended, for failed ones that Slurm or its accounting still knows."""
        return self._ended.endings(ids)

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        """Return why tasks wait, from the last answer about states."""
        return {task: self._waiting_for[task] for task in ids if task in self._waiting_for}

    def cancel(self, ids: Sequence[str]) -> None:
        """End tasks; tasks that are gone are ignored.

        Raises:
            SchedulerUnreachable: slurmctld does not answer now.
        """
        if not ids:
            return
        # Slurm refuses if a task ended meanwhile; a caller that must be sure asks for states
        with contextlib.suppress(CommandRefused):
            self._commands.call(["scancel", "--quiet", *expressions(ids)])
