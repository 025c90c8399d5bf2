"""Records of jobs and clients that people read, and of evaluations: small, without torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fedllm.storage.records import ClientScores, Group, Record
from fedllm.storage.trust.printable import Line

MOST_LOSSES = 32

# what is counted (`rows tokenised`), how many are done, and of how many
Count = Callable[[str, int, int], None]


def uncounted(what: str, done: int, total: int) -> None:
    """Count nothing."""


@dataclass(kw_only=True)
class Tally:
    """Tally of what is done, which arrives in parts and is told to `count`."""

    what: str
    count: Count
    total: int = 0
    done: int = 0

    def add(self, further: int) -> None:
        """Note that so many more are done."""
        self.done += further
        self.count(self.what, self.done, self.total)


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


class ProgressRecord(Record):
    """Progress of a job that runs: of `total` things `done` are, after `seconds` of this work."""

    what: str
    done: int
    total: int
    seconds: float

    @property
    def rate(self) -> float:
        """How many are done in a second."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def left_seconds(self) -> float | None:
        """The seconds until all are done; None: not known yet."""
        return (self.total - self.done) / self.rate if self.rate else None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The share, the rate and the time left in words; at the end, the share and the time."""
        parts = [f"{self.done:,} of {self.total:,}"]
        if self.left_seconds is not None and self.done < self.total:
            rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
            parts += [f"{rate} a second", f"{duration(self.left_seconds)} left"]
        elif self.done == self.total:
            parts.append(duration(self.seconds))
        return tuple(parts)

    @property
    def text(self) -> str:
        """The progress in one line."""
        return f"{self.what}: {', '.join(self.numbers)}"


class ClientCosts(Record):
    """What the training of a client took, as the accounts of its tier need it."""

    tier: str
    rank: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    energy_joules: float | None = None
    bytes_up: int
    bytes_down: int
    values_down: int
    trainable: int = 0
    flops: float | None = None
    padded_flops: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None


class TrainedClient(ClientCosts):
    """A client whose update a round published, without its tensors and long lists.

    `rank` is the largest over its modules. `used` tells whether the round used the update; a client
    that failed has a `reason`. Losses are per target token: `loss` is the mean over all steps,
    `losses` the means of at most 32 equal spans of steps. `bytes_up` is the size of the update's
    tensors in its file, `values_up` their number of values (two bytes each at 16 bit); `bytes_down`
    and `values_down` are those of what the client received, frozen parts too; `trainable` of these
    values were trained. `flops` are the operations
    of its training, `padded_flops` those of a loop that pads the rows of every step to the longest;
    None where the tokens were not counted. `energy_joules` is that of the whole device meanwhile;
    None where it does not tell.
    """

    client: str
    used: bool
    reason: str = ""
    attempt: int
    node: str = ""
    task: str = ""
    resumes: int = 0
    rows: int
    steps: int
    loss_tokens: int
    computed_tokens: int = 0
    padded_tokens: int = 0
    step_seconds: float
    values_up: int
    loss: float | None = None
    losses: tuple[float, ...] = ()
    gradient_norm_mean: float | None = None
    gradient_norm_max: float | None = None


class ClientsRecord(Record):
    """The clients of a round as they were collected, in the cohort's order."""

    round: int
    clients: list[TrainedClient]


class KeptAnswer(Record):
    """A test row of a client, and what its deployed adapter answered; `loss` is per answer token.

    `row` is the index into the client's test rows; `prompt` are its last characters, as text.
    """

    client: str
    group: Group
    tier: str
    row: int
    prompt: str
    references: list[str]
    answer: str
    loss: float
    rouge_l: float
    exact_match: float


class AnswersRecord(Record):
    """Generated answers of a round's evaluation, a few rows a client."""

    round: int
    state_sha256: str
    answers: list[KeptAnswer]


class RequestRecord(Record):
    """An evaluation that `fedllm evaluate` asks for: of which round, at which rank for all clients.

    Without a rank every client is scored at its own and at the largest.
    """

    round: int
    rank: int | None = None


class PartRecord(Record):
    """The scores of a piece of an evaluation, by the task that computed them.

    `key` names the state, the clients and their rows: a part with another one is of an evaluation
    that is not asked for any more.
    """

    key: str
    state_sha256: str
    task: Line
    node: Line = ""
    seconds: float
    clients: list[ClientScores]
    answers: list[KeptAnswer]


class ExportedRecord(Record):
    """The last round whose metrics a tracker was given."""

    round: int


class FailureRecord(Record):
    """The error that ended a coordinator, and the step that it was taking.

    `exit_code` is that of the error: 3 if `resume` goes on without a change.
    """

    lease: int
    round: int
    step: str
    kind: str
    message: str
    exit_code: int


class TaskTimes(Record):
    """The times of a task in seconds since the epoch, by the clock of the file system.

    From `submitted` to `started` it waited. `started` is that of its last start. Times come from
    modification times and from seconds that the task reported: they are for people alone.
    """

    kind: Literal["client", "aggregate", "evaluate"]
    task: str
    node: str = ""
    worker_class: str = ""
    attempt: int
    submitted: float
    started: float
    ended: float
    clients: int = 0
    busy_seconds: float = 0.0
    starts: int = 1


class TasksRecord(Record):
    """The tasks of a finished round."""

    round: int
    tasks: list[TaskTimes]


def shortened(values: Sequence[float], most: int = MOST_LOSSES) -> tuple[float, ...]:
    """Return the means of at most `most` equal spans of `values`, to six digits."""
    spans = min(most, len(values))
    bounds = [span * len(values) // spans for span in range(spans + 1)] if spans else []
    pairs = pairwise(bounds)
    return tuple(float(f"{sum(values[a:b]) / (b - a):.6g}") for a, b in pairs)
