"""Ends of failed tasks, from squeue, which forgets them after minutes, and the accounting.

The coordinator asks for them only at events, such as a task that is gone.
"""

from collections.abc import Sequence

from fedllm.planning.backoff import Backoff
from fedllm.scheduling.seam import Ending, SchedulerUnreachable
from fedllm.scheduling.slurm.command_output import rows_of
from fedllm.scheduling.slurm.commands import CommandRefused, Commands, squeue
from fedllm.scheduling.slurm.notation import arrays_of, tasks_of
from fedllm.scheduling.slurm.states import ended_well, has_ended

_ACCOUNTING_WINDOW = "now-7days"
_MAX_PAUSE = 8  # times `query_seconds`


class Endings:
    """Ends of tasks, as far as Slurm knows them.

    Args:
        query_seconds: the minimum time between two queries of the same tasks; each failure
            doubles it.
        commands: Slurm's commands.
    """

    def __init__(self, *, query_seconds: float, commands: Commands) -> None:
        self._pause = Backoff(query_seconds, max_seconds=_MAX_PAUSE * query_seconds)
        self._commands = commands
        self._known: dict[str, Ending] = {}
        self._not_found: set[str] = set()
        self._next_query = float("-inf")
        self._has_accounting = True

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended, for those that failed; one query for all.

        Tasks that are new here are queried at once. Tasks that Slurm did not know, and all tasks
        while Slurm does not answer, are queried again only after a while.
        """
        unknown = {task for task in ids if task not in self._known}
        is_due = self._commands.monotonic() >= self._next_query
        has_new = not unknown <= self._not_found
        if unknown and (is_due or (has_new and not self._pause.failures)):
            self._ask(unknown)
        found = {task: self._known[task] for task in ids if task in self._known}
        return {task: ending for task, ending in found.items() if not ended_well(ending.state)}

    def accounting(self, *words: str) -> str:
        """Return sacct's output; empty where there is no accounting, or no answer."""
        if not self._has_accounting:
            return ""
        words = ("--starttime", _ACCOUNTING_WINDOW, *words)
        try:
            return self._commands.call(
                ["sacct", "--noheader", "--parsable2", "--allocations", *words]
            )
        except SchedulerUnreachable:
            return ""
        except CommandRefused as error:
            self._has_accounting = "storage is disabled" not in str(error)
            return ""

    def _ask(self, unknown: set[str]) -> None:
        for query in (self._in_queue, self._in_accounting):
            if unknown:
                arrays = sorted(arrays_of(unknown))
                self._known |= query(",".join(arrays))
                unknown = unknown - self._known.keys()
        self._not_found = unknown
        self._next_query = self._commands.monotonic() + self._pause.seconds

    def _in_queue(self, arrays: str) -> dict[str, Ending]:
        columns = "UserName:|,JobArrayID:|,State:|,exit_code:|,NodeList:|"
        try:
            output = squeue(f"--jobs={arrays}", "-O", columns, commands=self._commands)
        except SchedulerUnreachable:
            self._pause.fail()
            return {}
        except CommandRefused:
            # squeue has forgotten them
            return {}
        self._pause.succeed()
        endings = {}
        for _, task, state, status, node in rows_of(output, 5):
            if has_ended(state) and status.isdecimal():
                code = f"{int(status) >> 8}:{int(status) & 127}"
                endings[task] = _ending(state, code, node)
        return endings

    def _in_accounting(self, arrays: str) -> dict[str, Ending]:
        # --duplicates lists the earlier starts of a requeued task too; the last line counts
        words = ("--duplicates", f"--jobs={arrays}", "-o", "User,JobID,State,ExitCode,NodeList")
        endings = {}
        for _, task, state, code, node in rows_of(self.accounting(*words), 5):
            state = state.partition(" ")[0]  # `CANCELLED by 1000`
            if has_ended(state):
                for single in tasks_of(task):
                    endings[single] = _ending(state, code, node)
        return endings


def _ending(state: str, code: str, node: str) -> Ending:
    place = node if node != "None assigned" else ""
    return Ending(state=state, exit_code=code, node=place)
