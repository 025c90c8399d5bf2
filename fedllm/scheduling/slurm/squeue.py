"""Slurm's queue of our tasks: few queries, cached answers. Records, not Slurm, say what is done."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.planning.backoff import Backoff
from fedllm.scheduling.seam import CancelRefused, Ending, SchedulerUnreachable, TaskState
from fedllm.scheduling.slurm.command_output import MARK, marked_lines, rows_of
from fedllm.scheduling.slurm.commands import CommandRefused, Commands, squeue
from fedllm.scheduling.slurm.limits import Place
from fedllm.scheduling.slurm.notation import (
    arrays_of,
    expressions,
    named,
    settings,
    whole_arrays,
)
from fedllm.scheduling.slurm.states import state_in_queue, stays_ended
from fedllm.scheduling.slurm.task_endings import Endings
from fedllm.storage.trust.owners import user_name

_MAX_PAUSE = 8  # times `query_seconds`
_COLUMNS = ("%i", "%T", "%a", "%q", "%P", "%r")
QUEUE_COLUMNS = f"{MARK}{'|'.join(_COLUMNS)}"
NO_USERS: Mapping[str, int] = {}
_UNKNOWN_JOB = "invalid job id"
_NOT_ALLOWED = ("permission denied", "not permitted", "access denied", "privilege")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A listing of squeue: the state of every listed task, why it waits, and its place.

    `hidden` are jobs that Slurm may hide from this user, with the users who submitted them.
    """

    states: Mapping[str, TaskState]
    reasons: Mapping[str, str]
    places: Counter[Place]
    hidden: Mapping[str, int] = field(default_factory=dict)


class Queue:
    """The queue of tasks, from Slurm's cached answers.

    One query lists this user's tasks. Tasks that it does not list may be another user's, or Slurm
    may have forgotten them: they are gone only if Slurm says so when asked by their ids.

    Args:
        query_seconds: the minimum time between two queries of states; each failure doubles it.
        commands: Slurm's commands.
    """

    def __init__(self, *, query_seconds: float, commands: Commands) -> None:
        self._commands = commands
        self._pause = Backoff(query_seconds, max_seconds=_MAX_PAUSE * query_seconds)
        self._next_query = float("-inf")
        self._answer: Listing | None = None
        self._submitted_since: set[str] = set()
        self._asked_by_id: dict[str, TaskState] = {}
        self._reasons_by_id: dict[str, str] = {}
        self._gone: set[str] = set()
        self._users: dict[str, int] = {}
        self._last_states: tuple[list[str], dict[str, TaskState]] = [], {}
        self._trouble: str | None = None
        self._ended = Endings(query_seconds=query_seconds, commands=commands)

    def expect(self, ids: Iterable[str]) -> None:
        """Remember tasks that were submitted after the last answer: they are not gone."""
        self._last_states = [], {}
        self._submitted_since.update(ids)

    def attribute(self, ids: Iterable[str], user: int) -> None:
        """Remember the user, by number, who submitted the arrays of tasks."""
        self._users |= dict.fromkeys(arrays_of(ids), user)

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return the state of every task.

        It is UNKNOWN, never GONE, before Slurm's first answer, after a query that failed, and for
        tasks that Slurm neither lists nor declares ended or unknown.
        """
        self._ask_if_due()
        if self._answer is None:
            return dict.fromkeys(ids, TaskState.UNKNOWN)
        requested = [*ids]
        # callers ask about the same tasks again and again; the answer changes once a minute
        if requested != self._last_states[0]:
            listed = self._answer.states
            known = {**dict.fromkeys(self._submitted_since, TaskState.WAITING), **listed}
            self._ask_about({task for task in requested if task not in known})
            known = {**dict.fromkeys(self._gone, TaskState.GONE), **self._asked_by_id, **known}
            self._last_states = requested, {task: known[task] for task in requested}
        return dict(self._last_states[1])

    def queued(self, *, fresh: bool = False) -> Counter[Place] | None:
        """Return how many tasks of this user wait or run in each place; None: unknown.

        Tasks submitted since the last answer count for the empty place.
        """
        if fresh:
            self._next_query = float("-inf")
        self._ask_if_due()
        if self._answer is None:
            return None
        unplaced = len(self._submitted_since - self._answer.states.keys())
        return self._answer.places + Counter({Place(): unplaced})

    def trouble(self) -> str | None:
        """Return why states are unknown now; None: they are known."""
        return self._trouble

    def _ask_if_due(self) -> None:
        if self._commands.monotonic() < self._next_query:
            return
        try:
            output = squeue(f"--user={os.getuid()}", "-o", QUEUE_COLUMNS, commands=self._commands)
            answer = read_answer(output)
        except (SchedulerUnreachable, CommandRefused) as error:
            self._pause.fail()
            self._answer = None
            self._trouble = (
                f"Slurm does not answer ({error}); asking again in {self._pause.seconds:.0f} s"
            )
        else:
            self._pause.succeed()
            self._trouble = None
            self._answer = answer
            self._submitted_since.clear()
        self._last_states = [], {}
        self._asked_by_id, self._reasons_by_id = {}, {}
        self._next_query = self._commands.monotonic() + self._pause.seconds

    def _ask_about(self, absent: set[str]) -> None:
        """Ask by their ids for tasks that the last answer did not list, once for each answer."""
        asked = absent - self._gone - self._asked_by_id.keys()
        if not asked:
            return
        found = states_by_id(asked, self._commands, self._users)
        self._asked_by_id |= found.states
        self._reasons_by_id |= found.reasons
        self._gone |= {task for task, state in found.states.items() if state is TaskState.GONE}
        doubtful = [task for task, state in found.states.items() if state is TaskState.UNKNOWN]
        if found.hidden:
            self._trouble = _hidden_jobs(found.hidden)
        elif doubtful:
            self._trouble = (
                f"Slurm neither lists job {', '.join(arrays_of(doubtful))} nor says that it ended; "
                f"asking again in {self._pause.seconds:.0f} s"
            )

    def find(self, name: str) -> list[str] | None:
        """Return the tasks of the arrays named `name`, or None if Slurm knows of none.

        Slurm forgets ended jobs after minutes (MinJobAge); its accounting, if there is one, does
        not.

        Raises:
            SchedulerUnreachable: slurmctld does not answer now.
        """
        # Slurm splits the names that it is given at commas
        who = f"--user={os.getuid()}" if "," in name else f"--name={name}"
        try:
            output = squeue(who, "-o", f"{MARK}%i|%j", commands=self._commands)
        except CommandRefused as error:
            raise SchedulerUnreachable(f"squeue: {error}") from error
        listed = named(name, marked_lines(output, columns=2))
        if not listed:
            words = (f"--name={name}", "--allusers", "-o", "User,JobID,JobName")
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
        reasons = {**(self._answer.reasons if self._answer else {}), **self._reasons_by_id}
        return {task: reasons[task] for task in ids if task in reasons}

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        """End tasks, or only those that still wait; tasks that are gone are ignored.

        Raises:
            CancelRefused: some are another user's.
            SchedulerUnreachable: slurmctld does not answer now.
        """
        if ids:
            cancel(expressions(ids), self._commands, only_waiting=only_waiting)


def cancel(jobs: Sequence[str], commands: Commands, *, only_waiting: bool = False) -> None:
    """End jobs with scancel, or only those that still wait; jobs that are gone are ignored.

    Raises:
        CancelRefused: some are another user's.
        SchedulerUnreachable: slurmctld does not answer now.
    """
    try:
        # Slurm knows better than the last answer which of them started meanwhile
        states = ["--state=PENDING"] if only_waiting else []
        commands.call(["scancel", "--quiet", *states, *jobs])
    except CommandRefused as error:
        # it also refuses if a task ended meanwhile; a caller that must be sure asks for states
        if any(text in str(error).lower() for text in _NOT_ALLOWED):
            raise CancelRefused(
                f"scancel: {error}: their owner or an admin has to end {', '.join(jobs)}"
            ) from error


def states_by_id(
    ids: Iterable[str], commands: Commands, users: Mapping[str, int] = NO_USERS
) -> Listing:
    """Ask Slurm for tasks or jobs of any user by their ids.

    A task is GONE if squeue lists it as ended or lists others of its array only, or if Slurm does
    not know its id. It is UNKNOWN if squeue says nothing and scontrol does not confirm it, or if
    Slurm hides the jobs of its user and the accounting does not say that it ended.

    Args:
        ids: the tasks or jobs.
        commands: Slurm's commands.
        users: job -> number of the user who submitted it; those without are this user's.
    """
    wanted = [*ids]
    arrays = arrays_of(wanted)
    answer = Listing(states={}, reasons={}, places=Counter())
    try:
        words = (f"--jobs={','.join(arrays)}", "-o", QUEUE_COLUMNS)
        answer = read_answer(squeue(*words, commands=commands))
        listed = set(arrays_of(answer.states))
        gone = {array for array in arrays if array in listed or _is_forgotten(array, commands)}
    except CommandRefused as error:
        # only the query of a single id is refused for it
        gone = {*arrays} if _UNKNOWN_JOB in str(error).lower() else set()
    except SchedulerUnreachable:
        gone = set()
    foreign = {
        array: users[array]
        for array in gone - set(arrays_of(answer.states))
        if users.get(array, os.geteuid()) != os.geteuid()
    }
    hidden = _not_seen(foreign, commands) if foreign else {}
    gone -= hidden.keys()
    states = {
        id_: TaskState.GONE if id_.partition("_")[0] in gone else TaskState.UNKNOWN
        for id_ in wanted
    }
    # squeue lists the tasks of an array, not the array
    arrays_at_work = {
        task.partition("_")[0]: state
        for task, state in answer.states.items()
        if state is not TaskState.GONE
    }
    found = {**arrays_at_work, **answer.states}
    states |= {id_: found[id_] for id_ in wanted if id_ in found}
    return Listing(states=states, reasons=answer.reasons, places=answer.places, hidden=hidden)


def _is_forgotten(job: str, commands: Commands) -> bool:
    """Say whether Slurm knows no such job: an empty answer of squeue does not say so.

    Raises:
        SchedulerUnreachable: slurmctld does not answer now.
    """
    try:
        commands.call(["scontrol", "--oneliner", "show", "job", job])
    except CommandRefused as error:
        return _UNKNOWN_JOB in str(error).lower()
    return False


def _not_seen(users: Mapping[str, int], commands: Commands) -> dict[str, int]:
    """Return those of the jobs that may still wait or run though Slurm says that it has none such.

    Slurm hides them, and its accounting does not show that every task of theirs ended.

    Args:
        users: job -> number of the user who submitted it, which is not this one.
        commands: Slurm's commands.
    """
    if not _hides_jobs(commands):
        return {}
    ended = _ended(users, commands)
    return {job: user for job, user in users.items() if job not in ended}


def _hidden_jobs(users: Mapping[str, int]) -> str:
    """Return the trouble with hidden jobs in one sentence, with what would help."""
    names = sorted({user_name(user) for user in users.values()})
    return (
        f"Slurm hides the jobs of other users here (PrivateData=jobs), and job "
        f"{', '.join(sorted(users, key=int))} of {' and '.join(names)} may still run: have "
        f"{' or '.join(names)} resume this run, or cancel it first (fedllm cancel)"
    )


def _hides_jobs(commands: Commands) -> bool:
    """Say whether this user sees no jobs of others; where Slurm does not say, it may be so."""
    try:
        found = settings(commands.call(["scontrol", "show", "config"]))
    except (CommandRefused, SchedulerUnreachable):
        return True
    private = found.get("PrivateData")
    return private is None or bool({"jobs", "all"} & {*private.replace(" ", "").split(",")})


def _ended(jobs: Iterable[str], commands: Commands) -> set[str]:
    """Return the jobs of which the accounting lists tasks, and every one as ended for good."""
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--starttime", "now-7days"]
    which = ["--allusers", f"--jobs={','.join(jobs)}", "-o", "User,JobID,State"]
    try:
        output = commands.call([*words, *which])
    except (CommandRefused, SchedulerUnreachable):
        return set()
    states = [(arrays_of([id_])[0], state) for _, id_, state in rows_of(output, 3)]
    alive = {job for job, state in states if not stays_ended(state.partition(" ")[0])}
    return {job for job, _ in states} - alive


def read_answer(output: str) -> Listing:
    """Read squeue's lines of QUEUE_COLUMNS.

    Raises:
        SchedulerUnreachable: the answer was cut.
    """
    # most lines differ only in the task
    tasks_by_rest: dict[str, list[str]] = defaultdict(list)
    for line in marked_lines(output, columns=len(_COLUMNS)):
        task, _, rest = line.partition("|")
        tasks_by_rest[rest].append(task)
    states: dict[str, TaskState] = {}
    reasons: dict[str, str] = {}
    places: Counter[Place] = Counter()
    for rest, tasks in tasks_by_rest.items():
        word, account, qos, partition, reason = rest.split("|", len(_COLUMNS) - 2)
        state = state_in_queue(word)
        states |= dict.fromkeys(tasks, state)
        if state is not TaskState.GONE:
            places[Place(account=account, qos=qos, partition=partition)] += len(tasks)
        if state is TaskState.WAITING:
            reasons |= dict.fromkeys(tasks, reason)
    return Listing(states=states, reasons=reasons, places=places)
