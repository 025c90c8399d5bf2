"""How tasks ended, from Slurm's memory of minutes and its accounting; asked only at events."""

from collections.abc import Sequence

from fedllm.planning.backoff import Backoff
from fedllm.scheduling.seam import Ending, SchedulerUnreachable
from fedllm.scheduling.slurm.command_output import rows_of
from fedllm.scheduling.slurm.commands import CommandRefused, Commands, squeue
from fedllm.scheduling.slurm.notation import arrays_of, tasks_of
from fedllm.scheduling.slurm.states import ended_well, has_ended

_ACCOUNTING_WINDOW = "now-7days"
_LONGEST_PAUSE = 8  # in questions


class Endings:
    """What is known of tasks that ended.

    Args:
        query_seconds: the least time between two questions for the same tasks; failures double it.
        commands: Slurm's.
    """

    def __init__(self, *, query_seconds: float, commands: Commands) -> None:
        self._pause = Backoff(query_seconds, max_seconds=_LONGEST_PAUSE * query_seconds)
        self._commands = commands
        self._known: dict[str, Ending] = {}
        self._asked_in_vain: set[str] = set()
        self._next_query = float("-inf")
        self._has_accounting = True

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how tasks ended that failed; one question for all, and news at once.

        Tasks that nobody knew, and all of them while Slurm does not answer, are asked for again
        after a while only.
        """
        unknown = {task for task in ids if task not in self._known}
        is_due = self._commands.monotonic() >= self._next_query
        has_news = not unknown <= self._asked_in_vain
        if unknown and (is_due or (has_news and not self._pause.failures)):
            self._ask(unknown)
        found = {task: self._known[task] for task in ids if task in self._known}
        return {task: ending for task, ending in found.items() if not ended_well(ending.state)}

    def accounting(self, *words: str) -> str:
        """Ask sacct; a site without accounting, or one that does not answer, knows nothing."""
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
        for ask in (self._in_queue, self._in_accounting):
            if unknown:
                arrays = sorted(arrays_of(unknown))
                self._known |= ask(",".join(arrays))
                unknown = unknown - self._known.keys()
        self._asked_in_vain = unknown
        self._next_query = self._commands.monotonic() + self._pause.seconds

    def _in_queue(self, arrays: str) -> dict[str, Ending]:
        asked = "UserName:|,JobArrayID:|,State:|,exit_code:|,NodeList:|"
        try:
            said = squeue("-t", "all", f"--jobs={arrays}", "-O", asked, commands=self._commands)
        except SchedulerUnreachable:
            self._pause.fail()
            return {}
        except CommandRefused:
            # it forgot them
            return {}
        self._pause.succeed()
        endings = {}
        for _, task, state, status, node in rows_of(said, 5):
            if has_ended(state) and status.isdecimal():
                code = f"{int(status) >> 8}:{int(status) & 127}"
                endings[task] = _ending(state, code, node)
        return endings

    def _in_accounting(self, arrays: str) -> dict[str, Ending]:
        # --duplicates: also the earlier starts of a requeued task; the last line is the last start
        words = ("--duplicates", f"--jobs={arrays}", "-o", "User,JobID,State,ExitCode,NodeList")
        endings = {}
        for _, task, state, code, node in rows_of(self.accounting(*words), 5):
            state = state.partition(" ")[0]  # it says by whom: `CANCELLED by 1000`
            if has_ended(state):
                for each in tasks_of(task):
                    endings[each] = _ending(state, code, node)
        return endings


def _ending(state: str, code: str, node: str) -> Ending:
    place = node if node != "None assigned" else ""
    return Ending(state=state, exit_code=code, node=place)
