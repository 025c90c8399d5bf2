"""What a seed does to a run: which faults, in which round, at which step."""

import errno
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

ROUNDS = 6
FEWEST_FAULTS = 30
# beside one of each kind
_EXTRA_FAULTS = 2
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
    SUSPEND = "suspend a task"
    HOLD = "hold a task in the queue"
    ESTALE = "the file server answers: stale file handle"
    EIO = "the file server answers: input/output error"
    EACCES = "the file server answers: permission denied"
    ETIMEDOUT = "the file server answers: connection timed out"
    SQUEUE_NOISE = "squeue prints lines of its own"
    SQUEUE_EMPTY = "squeue prints nothing and says 0"
    SQUEUE_CUT = "squeue's last line is cut"
    SBATCH_NOISE = "sbatch prints lines of its own"
    SBATCH_SILENT = "sbatch submits, prints nothing and says 0"
    SBATCH_REFUSED = "sbatch submits and says that it did not"
    EDITED = "edit config.yaml by hand"
    COPIED = "copy the run directory and cancel the copy"
    SECOND_USER = "a second user of the group resumes the run"
    FORGED = "an update signed with another secret"
    REPLAYED = "an update of an earlier round"
    INFLATED = "an update of more rows than the client has"
    OVERSIZED = "an update with a header of 200 MB"


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
_OF_COORDINATORS = (COHORT, IDS, COLLECTION, AGGREGATION_PLAN, ROUND_RECORD)
_OF_SBATCH = (SBATCH, AGGREGATION_SBATCH)
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
    Kind.SUSPEND: _OF_WORKERS,
    Kind.HOLD: _OF_WORKERS,
    Kind.ESTALE: (*_OF_WORKERS, *_OF_COORDINATORS),
    Kind.EIO: (*_OF_WORKERS, *_OF_COORDINATORS),
    Kind.EACCES: (*_OF_WORKERS, *_OF_COORDINATORS),
    Kind.ETIMEDOUT: (*_OF_WORKERS, *_OF_COORDINATORS),
    Kind.SQUEUE_NOISE: _OF_WORKERS,
    Kind.SQUEUE_EMPTY: _OF_WORKERS,
    Kind.SQUEUE_CUT: _OF_WORKERS,
    Kind.SBATCH_NOISE: _OF_SBATCH,
    Kind.SBATCH_SILENT: _OF_SBATCH,
    Kind.SBATCH_REFUSED: _OF_SBATCH,
    Kind.EDITED: (ROUND_RECORD,),
    Kind.COPIED: _OF_WORKERS,
    Kind.SECOND_USER: (COHORT,),
    Kind.FORGED: (UPDATE,),
    Kind.REPLAYED: (UPDATE,),
    Kind.INFLATED: (UPDATE,),
    Kind.OVERSIZED: (UPDATE,),
}
ERRNOS = {
    Kind.ESTALE: errno.ESTALE,
    Kind.EIO: errno.EIO,
    Kind.EACCES: errno.EACCES,
    Kind.ETIMEDOUT: errno.ETIMEDOUT,
}
# they take long: at most one a round
_LONG = (
    *(Kind.FILL_DISK, Kind.SECOND_USER),
    *(Kind.CRASH_NODE, Kind.PREEMPT, Kind.RESTART_SLURMCTLD),
)
_SHORT = tuple(kind for kind in Kind if kind not in _LONG)
# what they make the coordinator say, or who it is then, is the test's to see
_OF_PROCESSES = (Kind.FILL_DISK, Kind.SECOND_USER, Kind.EDITED)
# what ends every task of a node would end the one that waits for its own fault
_OF_ONE_TASK = (Kind.CANCEL_TASK, Kind.SUSPEND, Kind.HOLD, Kind.COPIED, *ERRNOS)
_OF_NODES = (Kind.CRASH_NODE, Kind.PREEMPT)
PLANTED = (Kind.FORGED, Kind.REPLAYED, Kind.INFLATED, Kind.OVERSIZED)
# they need an update of an earlier round, or a first cohort: until then a result key may change
_NOT_FIRST = (Kind.FORGED, Kind.REPLAYED, Kind.INFLATED, Kind.EDITED)
_RESTRICTED = (
    *ERRNOS,
    *_OF_PROCESSES,
    *_OF_ONE_TASK,
    *_NOT_FIRST,
    Kind.OVERSIZED,
    Kind.KILL_AGGREGATING,
)
_FREE = tuple(kind for kind in _SHORT if kind not in _RESTRICTED)
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

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return self.legs[-1].last_round

    def first(self, rounds: int) -> "Plan":
        """Return what happens in the first rounds alone."""
        starts = [0, *(leg.last_round for leg in self.legs)]
        legs = [
            Leg(mode=leg.mode, last_round=min(leg.last_round, rounds))
            for leg, start in zip(self.legs, starts, strict=False)
            if start < rounds
        ]
        return Plan(legs=legs, faults=[fault for fault in self.faults if fault.round <= rounds])


def draw(seed: int) -> Plan:
    """Draw legs and faults: every kind at least once, about as many in every round."""
    chance = random.Random(seed)
    modes = chance.sample(MODES, len(MODES))
    each = ROUNDS // len(MODES)
    legs = [Leg(mode=mode, last_round=each * n) for n, mode in enumerate(modes, 1)]
    mode_of = {number: modes[(number - 1) // each] for number in range(1, ROUNDS + 1)}
    placed = _long_ones(chance, mode_of)
    short = [*_SHORT, *chance.sample(_FREE, _EXTRA_FAULTS)]
    chance.shuffle(short)
    # the most restricted first
    for kind in sorted(short, key=lambda kind: kind not in _RESTRICTED):
        full = Counter(number for _, number in placed)
        free = [
            number
            for number in mode_of
            if _may_be(kind, number, mode_of, [other for other, n in placed if n == number])
        ]
        placed.append((kind, min(free, key=lambda n: (full[n], chance.random()))))
    drawn = [(round_, chance.choice(MOMENTS[kind]), kind) for kind, round_ in placed]
    drawn.sort(key=lambda fault: (fault[0], _IN_ORDER.index(fault[1])))
    faults = [
        Fault(number=number, kind=kind, round=round_, moment=moment)
        for number, (round_, moment, kind) in enumerate(drawn, 1)
    ]
    return Plan(legs=legs, faults=faults)


def _long_ones(chance: random.Random, mode_of: dict[int, str]) -> list[tuple[Kind, int]]:
    own = [number for number, mode in mode_of.items() if mode == "process"]
    here = [kind for kind in _LONG if kind in _OF_PROCESSES]
    placed = list(zip(here, chance.sample(own, len(here)), strict=True))
    rest = [kind for kind in _LONG if kind not in here]
    others = [number for number in mode_of if number not in own]
    return [*placed, *zip(rest, chance.sample(others, len(rest)), strict=True)]


def _may_be(kind: Kind, number: int, mode_of: dict[int, str], others: Collection[Kind]) -> bool:
    """Say whether a kind may happen in a round that has these others."""
    forbidden = {
        kind in others,
        kind in _OF_PROCESSES and mode_of[number] != "process",
        kind in _OF_ONE_TASK and any(other in others for other in _OF_NODES),
        kind in _NOT_FIRST and number == 1,
        # Slurm lets stopped tasks go on to end them: the round may be over too early
        kind in PLANTED and any(other in others for other in (*_OF_NODES, Kind.RESTART_SLURMCTLD)),
        # of one process the calls of one fault fail
        kind in ERRNOS and any(other in ERRNOS for other in others),
        # no link of a chain is there while a job runs
        kind is Kind.KILL_AGGREGATING and mode_of[number] == "chain",
    }
    return not any(forbidden)
