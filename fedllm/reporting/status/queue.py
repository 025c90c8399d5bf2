"""Queue status of a run's arrays: which tasks wait, why, and what would help."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

WAITING, RUNNING, SUSPENDED = "waiting", "running", "suspended"
# what makes a task stand still, as Slurm does not say who did it
WHO_SUSPENDS = "an admin, or a job that preempts them, suspended them; `scontrol resume` ends it"


@dataclass(frozen=True, kw_only=True)
class SchedulerAnswers:
    """States of tasks from the scheduler, and why they wait.

    A state is waiting, running, suspended, gone or unknown.

    `problem` says why the scheduler does not answer.
    """

    states: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


AskScheduler = Callable[[Sequence[str]], SchedulerAnswers]


@dataclass(frozen=True, kw_only=True)
class ReasonStatus:
    """The reason why tasks of an array wait, in the scheduler's word, and what would help."""

    reason: str
    tasks: int
    advice: str


@dataclass(frozen=True, kw_only=True)
class ArrayStatus:
    """An array with tasks that wait, run or are suspended."""

    name: str
    tasks: int
    waiting: int
    running: int
    suspended: int = 0
    reasons: tuple[ReasonStatus, ...]


@dataclass(frozen=True, kw_only=True)
class QueueStatus:
    """The arrays of a run in the queue; `problem` says why the scheduler does not answer."""

    problem: str
    arrays: tuple[ArrayStatus, ...]


def queue_status(
    jobs: Mapping[str, Sequence[str]], answers: SchedulerAnswers, advice: Callable[[str], str]
) -> QueueStatus:
    """Return the arrays that have tasks that wait, run or are suspended.

    Args:
        jobs: array -> task ids.
        answers: the scheduler's answers about them.
        advice: returns what would help against a reason to wait.
    """
    arrays = (_array(name, ids, answers, advice) for name, ids in jobs.items())
    alive = tuple(array for array in arrays if array.waiting or array.running or array.suspended)
    return QueueStatus(problem=answers.problem, arrays=alive)


def _array(
    name: str, ids: Sequence[str], answers: SchedulerAnswers, advice: Callable[[str], str]
) -> ArrayStatus:
    states = Counter(answers.states.get(id_) for id_ in ids)
    reasons = Counter(answers.reasons[id_] for id_ in ids if id_ in answers.reasons)
    return ArrayStatus(
        name=name,
        tasks=len(ids),
        waiting=states[WAITING],
        running=states[RUNNING],
        suspended=states[SUSPENDED],
        reasons=tuple(
            ReasonStatus(reason=reason, tasks=tasks, advice=advice(reason))
            for reason, tasks in reasons.most_common()
        ),
    )
