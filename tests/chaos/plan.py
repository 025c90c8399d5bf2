"""What a seed does to a run: which faults, in which round, at which step."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

ROUNDS = 6
FEWEST_FAULTS = 15
_EXTRA_FAULTS = 9
MODES = ("process", "job", "chain")


class Kind(StrEnum):
    """What is done."""

    KILL_TASK = "kill -9 a task"
    CANCEL_TASK = "scancel a task"
    CRASH_NODE = "crash a node"
    PREEMPT = "preempt a task"
    RESTART_SLURMCTLD = "restart slurmctld"
    FILL_DISK = "fill the disk"
    KILL_BEFORE_SBATCH = "kill -9 the coordinator between intent and sbatch"
    KILL_BEFORE_IDS = "kill -9 the coordinator between sbatch and ids"
    KILL_COLLECTING = "kill -9 the coordinator during collection"
    KILL_AGGREGATING = "kill -9 the coordinator during aggregation"
    KILL_PUBLISHING = "kill -9 the coordinator during publication"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A step of a round: an audit event of Python and what it is about.

    `{round}` is the round in paths, of four digits; `{number}` that in names of jobs, of two.
    """

    words: str
    event: str
    pattern: str


CLAIM = Moment(
    words="a worker has just claimed a bundle",
    # the folder is synced once a claim was won
    event="open",
    pattern="*/rounds/{round}/attempts/*/claims",
)
CHECKPOINT = Moment(
    words="a worker in the midst of a client writes its checkpoint",
    event="os.rename",
    pattern="*/rounds/{round}/checkpoints/*.safetensors",
)
UPDATE = Moment(
    words="a worker publishes an update",
    event="os.rename",
    pattern="*/rounds/{round}/updates/*.safetensors",
)
SBATCH = Moment(
    words="the array's plan is written, sbatch is next",
    event="subprocess.Popen",
    pattern="*sbatch *r{number}-train-*-a01-*",
)
IDS = Moment(
    words="the array is submitted, its id is not yet recorded",
    event="os.rename",
    pattern="*/rounds/{round}/attempts/01/jobs.json",
)
COLLECTION = Moment(
    words="collection.json is written, not yet published",
    event="os.rename",
    pattern="*/rounds/{round}/collection.json",
)
AGGREGATION_PLAN = Moment(
    words="the aggregation's plan is written, not yet published",
    event="os.rename",
    pattern="*/rounds/{round}/aggregate/attempts/01/submission.json",
)
AGGREGATION_SBATCH = Moment(
    words="the aggregation's plan is published, sbatch is next",
    event="subprocess.Popen",
    pattern="*sbatch *r{number}-aggregate-*-a01*",
)
AGGREGATION_IDS = Moment(
    words="the aggregation is submitted, its id is not yet recorded",
    event="os.rename",
    pattern="*/rounds/{round}/aggregate/attempts/01/jobs.json",
)
STATE = Moment(
    words="the aggregation publishes the state",
    event="os.rename",
    pattern="*/rounds/{round}/aggregate/global.safetensors",
)
STATE_RECORD = Moment(
    words="the state is published, its record is not",
    event="os.rename",
    pattern="*/rounds/{round}/aggregate/aggregate.json",
)
COHORT = Moment(
    words="cohort.json is written, not yet published",
    event="os.rename",
    pattern="*/rounds/{round}/cohort.json",
)
ROUND_RECORD = Moment(
    words="round.json is written, not yet published",
    event="os.rename",
    pattern="*/rounds/{round}/round.json",
)

_IN_ORDER = (
    *(COHORT, SBATCH, IDS, CLAIM, CHECKPOINT, UPDATE, COLLECTION),
    *(AGGREGATION_PLAN, AGGREGATION_SBATCH, AGGREGATION_IDS, STATE, STATE_RECORD, ROUND_RECORD),
)
_OF_WORKERS = (CLAIM, CHECKPOINT, UPDATE)
MOMENTS: dict[Kind, tuple[Moment, ...]] = {
    Kind.KILL_TASK: (*_OF_WORKERS, STATE_RECORD),
    Kind.CANCEL_TASK: _OF_WORKERS,
    Kind.CRASH_NODE: _OF_WORKERS,
    Kind.PREEMPT: _OF_WORKERS,
    Kind.RESTART_SLURMCTLD: _OF_WORKERS,
    Kind.FILL_DISK: (CLAIM, CHECKPOINT, AGGREGATION_PLAN),
    Kind.KILL_BEFORE_SBATCH: (SBATCH, AGGREGATION_SBATCH),
    Kind.KILL_BEFORE_IDS: (IDS, AGGREGATION_IDS),
    Kind.KILL_COLLECTING: (COLLECTION,),
    Kind.KILL_AGGREGATING: (STATE, STATE_RECORD),
    Kind.KILL_PUBLISHING: (COHORT, ROUND_RECORD),
}
# they take long: at most one a round
_LONG = (Kind.CRASH_NODE, Kind.PREEMPT, Kind.RESTART_SLURMCTLD, Kind.FILL_DISK)
_SHORT = tuple(kind for kind in Kind if kind not in _LONG)
_RESTRICTED = (Kind.CANCEL_TASK, Kind.KILL_AGGREGATING)
# the others stop their process until what has to happen has happened
_KILLED_BY_THE_WIRE = (
    Kind.KILL_TASK,
    Kind.KILL_BEFORE_SBATCH,
    Kind.KILL_BEFORE_IDS,
    Kind.KILL_COLLECTING,
    Kind.KILL_PUBLISHING,
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    number: int
    kind: Kind
    round: int
    moment: Moment

    @property
    def wire(self) -> dict[str, str]:
        """What the processes of the run are told about it."""
        return {
            "id": f"{self.number:02d}",
            "event": self.moment.event,
            "pattern": self.moment.pattern.format(
                round=f"{self.round:04d}", number=f"{self.round:02d}"
            ),
            "act": "kill" if self.kind in _KILLED_BY_THE_WIRE else "stop",
        }

    def __str__(self) -> str:
        """Say what is done, in which round and at which step."""
        return f"fault {self.number}: {self.kind}, round {self.round}: {self.moment.words}"


@dataclass(frozen=True, kw_only=True)
class Leg:
    """Some rounds under one kind of coordinator: a `process`, a `job`, or a `chain` of jobs."""

    mode: str
    last_round: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a seed decides."""

    legs: Sequence[Leg]
    faults: Sequence[Fault]

    @property
    def wires(self) -> list[dict[str, str]]:
        """What the processes of the run are told.

        Those that kill come first: after a process that was stopped goes on, its step is over.
        """
        return sorted((fault.wire for fault in self.faults), key=lambda wire: wire["act"])


def draw(seed: int) -> Plan:
    """Draw legs and faults: every kind at least once, about as many in every round."""
    chance = random.Random(seed)
    modes = chance.sample(MODES, len(MODES))
    each = ROUNDS // len(MODES)
    legs = [Leg(mode=mode, last_round=each * n) for n, mode in enumerate(modes, 1)]
    mode_of = {number: modes[(number - 1) // each] for number in range(1, ROUNDS + 1)}
    placed = _long_ones(chance, mode_of)
    short = [*_SHORT, *_SHORT, *chance.sample(_SHORT, _EXTRA_FAULTS - len(_SHORT))]
    chance.shuffle(short)
    # the most restricted first
    for kind in sorted(short, key=lambda kind: kind not in _RESTRICTED):
        full = Counter(number for _, number in placed)
        free = [n for n in mode_of if (kind, n) not in placed and _may_be(kind, n, mode_of, placed)]
        placed.append((kind, min(free, key=lambda n: (full[n], chance.random()))))
    drawn = [(round_, chance.choice(MOMENTS[kind]), kind) for kind, round_ in placed]
    drawn.sort(key=lambda fault: (fault[0], _IN_ORDER.index(fault[1])))
    faults = [
        Fault(number=number, kind=kind, round=round_, moment=moment)
        for number, (round_, moment, kind) in enumerate(drawn, 1)
    ]
    return Plan(legs=legs, faults=faults)


def _long_ones(chance: random.Random, mode_of: dict[int, str]) -> list[tuple[Kind, int]]:
    # what a full disk makes the coordinator say has to be read where the disk is not full
    disk = chance.choice([n for n, mode in mode_of.items() if mode == "process"])
    others = [n for n in mode_of if n != disk]
    rest = [kind for kind in _LONG if kind is not Kind.FILL_DISK]
    return [(Kind.FILL_DISK, disk), *zip(rest, chance.sample(others, len(rest)), strict=True)]


def _may_be(
    kind: Kind, number: int, mode_of: dict[int, str], placed: Sequence[tuple[Kind, int]]
) -> bool:
    if kind is Kind.CANCEL_TASK:
        # what ends every task of a node would end the one that waits to be cancelled
        return not any((other, number) in placed for other in (Kind.CRASH_NODE, Kind.PREEMPT))
    # no link of a chain is there while a job runs
    return kind is not Kind.KILL_AGGREGATING or mode_of[number] != "chain"
