"""What a scheduler says of a run's arrays: what waits, why, and what would help."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

WAITING, RUNNING = "waiting", "running"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a scheduler says of tasks: waiting, running, gone or unknown, and why they wait.

    `problem` says why it does not answer.
    """

    states: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


Ask = Callable[[Sequence[str]], Answers]


@dataclass(frozen=True, kw_only=True)
class ReasonStatus:
    """Why tasks of an array wait, in the scheduler's word, and what would help."""

    reason: str
    tasks: int
    advice: str


@dataclass(frozen=True, kw_only=True)
class ArrayStatus:
    """An array of which tasks wait or run."""

    name: str
    tasks: int
    waiting: int
    running: int
    reasons: tuple[ReasonStatus, ...]


@dataclass(frozen=True, kw_only=True)
class QueueStatus:
    """What the scheduler says of the run's arrays; `problem` where it does not answer."""

    problem: str
    arrays: tuple[ArrayStatus, ...]


def queue_status(
    jobs: Mapping[str, Sequence[str]], answers: Answers, advice: Callable[[str], str]
) -> QueueStatus:
    """Return what is known of the arrays of which tasks wait or run.

    Args:
        jobs: array -> task ids.
        answers: what the scheduler said of them.
        advice: what would help against a reason to wait.
    """
    arrays = (_array(name, ids, answers, advice) for name, ids in jobs.items())
    alive = tuple(array for array in arrays if array.waiting or array.running)
    return QueueStatus(problem=answers.problem, arrays=alive)


def _array(
    name: str, ids: Sequence[str], answers: Answers, advice: Callable[[str], str]
) -> ArrayStatus:
    states = Counter(answers.states.get(id_) for id_ in ids)
    reasons = Counter(answers.reasons[id_] for id_ in ids if id_ in answers.reasons)
    return ArrayStatus(
        name=name,
        tasks=len(ids),
        waiting=states[WAITING],
        running=states[RUNNING],
        reasons=tuple(
            ReasonStatus(reason=reason, tasks=tasks, advice=advice(reason))
            for reason, tasks in reasons.most_common()
        ),
    )
