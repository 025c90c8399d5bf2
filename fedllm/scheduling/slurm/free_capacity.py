"""What a cluster has room for: its limits and idle resources, asked for rarely."""

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from fedllm.errors import UserError
from fedllm.scheduling.seam import Capacity, SchedulerUnreachable
from fedllm.scheduling.slurm import limits as slurm_limits
from fedllm.scheduling.slurm import nodes as slurm_nodes
from fedllm.scheduling.slurm.commands import CommandRefused, Commands, clean_environment
from fedllm.scheduling.slurm.limits import (
    ACCOUNT_COLUMNS,
    QOS_COLUMNS,
    USER_COLUMNS,
    Accounting,
    Allowed,
    Configuration,
    Partition,
    Place,
)
from fedllm.scheduling.slurm.nodes import NODE_COLUMNS, Request
from fedllm.storage.paths import MOST_ENTRIES

# a folder of logs and their sbatch files stays small
LARGEST_ARRAY = MOST_ENTRIES
# one job more than arrays take: aggregation and evaluation need a place in the queue too
_KEPT = 1
# in multiples and parts of `scheduler.query_seconds`
_LIMITS_LAST = 10
_MOMENTS = 10
_WITH_LIMITS = {"limits", "qos", "safe"}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of the cluster now, for a job of certain options.

    Attributes:
        configuration: None: the controller does not answer.
        partitions: those that the job names, else the default one; empty: unknown.
        all_partitions: the names of all there are.
        accounting: None where limits are not enforced, or nobody tells.
        place: where the job is counted.
        allowed: what it may do there.
    """

    configuration: Configuration | None
    partitions: tuple[Partition, ...] = ()
    all_partitions: tuple[str, ...] = ()
    accounting: Accounting | None = None
    place: Place = field(default_factory=Place)
    allowed: Allowed = field(default_factory=Allowed)

    @property
    def max_minutes(self) -> float | None:
        """The longest time limit: that of all partitions, and of QOS or association."""
        limits = [partition.max_minutes for partition in self.partitions]
        limits.append(self.allowed.max_minutes)
        return min((limit for limit in limits if limit is not None), default=None)


class Surveyor:
    """Asks Slurm about its limits, each question once in a while; idle resources, when it plans.

    What cannot be learned limits nothing: sbatch has the last word.
    """

    def __init__(self, *, commands: Commands, query_seconds: float) -> None:
        self._commands = commands
        self._query_seconds = query_seconds
        self._answers: dict[tuple[str, ...], tuple[float, str | None]] = {}

    def survey(self, flags: Mapping[str, object]) -> Survey:
        """Return what limits a job of these sbatch options."""
        said = self._ask("scontrol", "show", "config", lasts=inf)
        listed = self._ask("scontrol", "--all", "--oneliner", "show", "partition") if said else None
        if said is None or listed is None:
            return Survey(configuration=None)
        configuration = slurm_limits.configuration(said)
        known = slurm_limits.partitions(listed)
        place = _named(flags)
        names = place.partition.split(",") if place.partition else []
        chosen = tuple(known[name] for name in names if name in known) or tuple(
            partition for partition in known.values() if not names and partition.is_default
        )
        place = Place(
            account=place.account, qos=place.qos, partition=",".join(p.name for p in chosen)
        )
        accounting = self._accounting(configuration)
        allowed = Allowed()
        if accounting:
            place, _ = slurm_limits.place_of(place, accounting)
            if configuration.enforced & _WITH_LIMITS:
                qos = chosen[0].qos if chosen else ""
                allowed = slurm_limits.allowed(place, qos, accounting)
        return Survey(
            configuration=configuration,
            partitions=chosen,
            all_partitions=tuple(known),
            accounting=accounting,
            place=place,
            allowed=allowed,
        )

    def capacity(
        self, flags: Mapping[str, object], *, queued: Mapping[Place, int] | None, max_parallel: int
    ) -> Capacity:
        """Return what there is room for beside what is `queued`, at most `max_parallel` at once."""
        found = self.survey(flags)
        configuration = found.configuration
        if configuration is None:
            return Capacity(
                free_slots=max_parallel, max_parallel=max_parallel, largest_array=LARGEST_ARRAY
            )
        asked = _request(flags, found)
        most = _max_parallel(found.allowed, asked, max_parallel)
        fits = self._fitting(asked, found) if asked else None
        sizes = [LARGEST_ARRAY, configuration.max_array_size, configuration.max_array_tasks]
        free = self.room(flags, queued=queued)
        return Capacity(
            free_slots=most if fits is None else min(most, fits),
            max_parallel=most,
            largest_array=max(1, min(size for size in sizes if size is not None)),
            free_tasks=room_for_workers(free),
            max_minutes=found.max_minutes,
        )

    def room(
        self, flags: Mapping[str, object], *, queued: Mapping[Place, int] | None
    ) -> int | None:
        """Return how many more tasks may be queued, or None if no limit is known."""
        return slurm_limits.room(self.survey(flags).allowed, queued or {})

    def _fitting(self, asked: Request, found: Survey) -> int | None:
        columns = ",".join(f"{column}:|" for column in NODE_COLUMNS)
        where = ",".join(partition.name for partition in found.partitions)
        only = [f"--partition={where}"] if where else []
        # one answer for the classes of a plan
        moment = self._query_seconds / _MOMENTS
        said = self._ask("sinfo", "--noheader", "--Node", *only, "-O", columns, lasts=moment)
        if said is None:
            return None
        try:
            return slurm_nodes.fitting(slurm_nodes.nodes(said), asked)
        except ValueError:
            return None

    def _accounting(self, configuration: Configuration) -> Accounting | None:
        if configuration.enforced.isdisjoint({*_WITH_LIMITS, "associations"}):
            return None
        here = f"cluster={configuration.cluster}"
        try:
            user = f"name={pwd.getpwuid(os.getuid()).pw_name}"
        except KeyError:
            # a container that knows no users
            return None
        users = self._table("user", USER_COLUMNS, user, here, "withassoc")
        accounts = self._table("assoc", ACCOUNT_COLUMNS, "user=", here)
        qos = self._table("qos", QOS_COLUMNS)
        if users is None:
            return None
        return slurm_limits.accounting(users, accounts or "", qos or "")

    def _table(self, kind: str, columns: tuple[str, ...], *which: str) -> str | None:
        words = ("--noheader", "--parsable2", "show", kind, *which, f"format={','.join(columns)}")
        return self._ask("sacctmgr", *words)

    def _ask(self, *words: str, lasts: float | None = None) -> str | None:
        now = self._commands.monotonic()
        until, said = self._answers.get(words, (now, None))
        if now < until:
            return said
        try:
            said = self._commands.call(words)
        except (SchedulerUnreachable, CommandRefused, UserError):
            said = None
        seconds = _LIMITS_LAST * self._query_seconds if lasts is None else lasts
        self._answers[words] = (now + (self._query_seconds if said is None else seconds), said)
        return said


def room_for_workers(room: int | None) -> int | None:
    """Return how many of the tasks that there is room for may be workers."""
    return None if room is None else max(0, room - _KEPT)


def _named(flags: Mapping[str, object]) -> Place:
    """Return what options or defaults in the environment name."""
    environment = clean_environment(configured=tuple(flags))
    named = {
        option: str(flags.get(option) or environment.get(f"SBATCH_{option.upper()}", ""))
        for option in ("account", "qos", "partition")
    }
    return Place(**named)


def _request(flags: Mapping[str, object], found: Survey) -> Request | None:
    """Return what a task asks for; None where only Slurm can say."""
    assert found.configuration
    if "reservation" in flags:
        return None
    partition = found.partitions[0] if found.partitions else None
    try:
        return slurm_nodes.request(flags, found.configuration, partition)
    except ValueError:
        return None


def _max_parallel(allowed: Allowed, asked: Request | None, max_parallel: int) -> int:
    most = [max_parallel]
    if allowed.max_running is not None:
        most.append(allowed.max_running)
    for name, amount in asked.tres().items() if asked else ():
        if amount and name in allowed.max_tres:
            most.append(int(allowed.max_tres[name] // amount))
    # a task that fits no limit is sbatch's to refuse
    return max(1, min(most))
