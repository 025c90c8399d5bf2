"""What Slurm says about our jobs: few questions, cached answers, and never the truth about work."""

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

_LONGEST_PAUSE = 8  # in questions


class Queue:
    """Slurm's answers about the tasks of this user.

    Args:
        query_seconds: the least time between two questions for states; failures double it.
        commands: Slurm's.
    """

    def __init__(self, *, query_seconds: float, commands: Commands) -> None:
        self._commands = commands
        self._pause = Backoff(query_seconds, max_seconds=_LONGEST_PAUSE * query_seconds)
        self._next_query = float("-inf")
        self._listed: dict[str, TaskState] | None = None
        self._submitted_since: set[str] = set()
        self._waiting_for: dict[str, str] = {}
        self._places: Counter[Place] = Counter()
        self._told: tuple[list[str], dict[str, TaskState]] = [], {}
        self._trouble: str | None = None
        self._ended = Endings(query_seconds=query_seconds, commands=commands)

    def expect(self, ids: Iterable[str]) -> None:
        """Remember tasks that the last answer cannot know yet: they are not gone."""
        self._told = [], {}
        self._submitted_since.update(ids)

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return what is known of every task.

        Before Slurm has answered once, and after it failed to, that is UNKNOWN: never GONE.
        """
        self._ask_if_due()
        if self._listed is None:
            return dict.fromkeys(ids, TaskState.UNKNOWN)
        asked = [*ids]
        # the same tasks are asked about again and again, and news come once a minute
        if asked != self._told[0]:
            known = {**dict.fromkeys(self._submitted_since, TaskState.WAITING), **self._listed}
            gone = TaskState.GONE
            self._told = asked, {task: known.get(task, gone) for task in asked}
        return dict(self._told[1])

    def queued(self, *, fresh: bool = False) -> Counter[Place] | None:
        """Return how many tasks of this user are queued or running in each place; None: unknown.

        Those submitted since Slurm was asked are in no place yet.
        """
        if fresh:
            self._next_query = float("-inf")
        self._ask_if_due()
        if self._listed is None:
            return None
        unplaced = len(self._submitted_since - self._listed.keys())
        return self._places + Counter({Place(): unplaced})

    def trouble(self) -> str | None:
        """Return why nothing is known of states now."""
        return self._trouble

    def _ask_if_due(self) -> None:
        now = self._commands.monotonic()
        if now < self._next_query:
            return
        try:
            said = squeue("-o", f"{MARK}%i|%T|%a|%q|%P|%r", commands=self._commands)
        except (SchedulerUnreachable, CommandRefused) as error:
            self._pause.fail()
            self._listed = None
            self._trouble = (
                f"Slurm does not answer ({error}); asking again in {self._pause.seconds:.0f} s"
            )
        else:
            self._pause.succeed()
            self._trouble = None
            self._hear(marked_lines(said))
        self._next_query = self._commands.monotonic() + self._pause.seconds

    def _hear(self, lines: Sequence[str]) -> None:
        self._submitted_since.clear()
        self._told = [], {}
        self._waiting_for = {}
        self._places.clear()
        # most lines differ in the task alone
        alike: dict[str, list[str]] = defaultdict(list)
        for line in lines:
            task, _, rest = line.partition("|")
            alike[rest].append(task)
        self._listed = {}
        for rest, tasks in alike.items():
            state, account, qos, partition, reason = rest.split("|", 4)
            known = state_in_queue(state)
            self._listed |= dict.fromkeys(tasks, known)
            self._places[Place(account=account, qos=qos, partition=partition)] += len(tasks)
            if known is TaskState.WAITING:
                self._waiting_for |= dict.fromkeys(tasks, reason)

    def find(self, name: str) -> list[str] | None:
        """Return the tasks of the arrays named `name`, or None if Slurm knows of none.

        Slurm forgets ended jobs after minutes (MinJobAge); the accounting, where there is one,
        does not.

        Raises:
            SchedulerUnreachable: slurmctld cannot be asked now.
        """
        try:
            said = squeue("-t", "all", "-o", f"{MARK}%i|%j", commands=self._commands)
        except CommandRefused as error:
            raise SchedulerUnreachable(f"squeue: {error}") from error
        listed = named(name, marked_lines(said))
        if not listed:
            words = (f"--name={name}", f"--user={os.getuid()}", "-o", "User,JobID,JobName")
            said = self._ended.accounting(*words)
            listed = named(name, (f"{id_}|{other}" for _, id_, other in rows_of(said, 3)))
        ids = whole_arrays(listed)
        self.expect(ids)
        return ids or None

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended that failed, as far as Slurm or its accounting still knows."""
        return self._ended.endings(ids)

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
            self._commands.call(["scancel", "--quiet", *expressions(ids)])
