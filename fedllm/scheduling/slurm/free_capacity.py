"""Free capacity of a cluster: its limits and idle resources, queried rarely."""

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
from fedllm.storage.paths import MAX_ENTRIES

# keeps a folder of logs small
LARGEST_ARRAY = MAX_ENTRIES
# places in the queue that stay free of workers: aggregation and evaluation need one
_RESERVED = 1
# limits are cached for this many `scheduler.query_seconds`, idle resources for this part of one
_LIMITS_QUERIES = 10
_IDLE_PARTS = 10
_WITH_LIMITS = {"limits", "qos", "safe"}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Slurm's settings and limits for a job of certain options.

    Attributes:
        configuration: the controller's settings; None: the controller does not answer.
        partitions: the partitions that the job names, else the default one; empty: unknown.
        all_partitions: the names of all partitions.
        accounting: the user's associations; None: no limits are enforced, or they are unknown.
        place: the account, QOS and partition that the job counts for.
        allowed: the limits there.
    """

    configuration: Configuration | None
    partitions: tuple[Partition, ...] = ()
    all_partitions: tuple[str, ...] = ()
    accounting: Accounting | None = None
    place: Place = field(default_factory=Place)
    allowed: Allowed = field(default_factory=Allowed)

    @property
    def max_minutes(self) -> float | None:
        """The longest time limit that all partitions and the QOS or association allow."""
        limits = [partition.max_minutes for partition in self.partitions]
        limits.append(self.allowed.max_minutes)
        return min((limit for limit in limits if limit is not None), default=None)


class Surveyor:
    """Queries of Slurm's limits and idle resources, with cached answers.

    A limit that cannot be read counts as none: sbatch refuses what is too much.
    """

    def __init__(self, *, commands: Commands, query_seconds: float) -> None:
        self._commands = commands
        self._query_seconds = query_seconds
        self._answers: dict[tuple[str, ...], tuple[float, str | None]] = {}

    def survey(self, flags: Mapping[str, object]) -> Survey:
        """Return the limits on a job of these sbatch options."""
        config = self._ask("scontrol", "show", "config", lasts=inf)
        listed = (
            self._ask("scontrol", "--all", "--oneliner", "show", "partition") if config else None
        )
        if config is None or listed is None:
            return Survey(configuration=None)
        configuration = slurm_limits.configuration(config)
        known = slurm_limits.partitions(listed)
        place = _configured_place(flags)
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
        """Return how many tasks fit beside those `queued`, at most `max_parallel` at once."""
        survey = self.survey(flags)
        configuration = survey.configuration
        if configuration is None:
            return Capacity(
                free_slots=max_parallel, max_parallel=max_parallel, largest_array=LARGEST_ARRAY
            )
        request = _request(flags, survey)
        parallel = _max_parallel(survey.allowed, request, max_parallel)
        fits = self._fitting(request, survey) if request else None
        sizes = [LARGEST_ARRAY, configuration.max_array_size, configuration.max_array_tasks]
        free = self.room(flags, queued=queued)
        return Capacity(
            free_slots=parallel if fits is None else min(parallel, fits),
            max_parallel=parallel,
            largest_array=max(1, min(size for size in sizes if size is not None)),
            free_tasks=room_for_workers(free),
            max_minutes=survey.max_minutes,
        )

    def room(
        self, flags: Mapping[str, object], *, queued: Mapping[Place, int] | None
    ) -> int | None:
        """Return how many more tasks may be queued; None: no limit is known."""
        return slurm_limits.room(self.survey(flags).allowed, queued or {})

    def _fitting(self, request: Request, survey: Survey) -> int | None:
        """Return how many tasks fit the idle nodes; None: sinfo does not answer, or unreadably."""
        columns = ",".join(f"{column}:|" for column in NODE_COLUMNS)
        names = ",".join(partition.name for partition in survey.partitions)
        only = [f"--partition={names}"] if names else []
        # cached so long that all classes of a plan use one answer
        seconds = self._query_seconds / _IDLE_PARTS
        output = self._ask("sinfo", "--noheader", "--Node", *only, "-O", columns, lasts=seconds)
        if output is None:
            return None
        try:
            return slurm_nodes.fitting(slurm_nodes.nodes(output), request)
        except ValueError:
            return None

    def _accounting(self, configuration: Configuration) -> Accounting | None:
        if configuration.enforced.isdisjoint({*_WITH_LIMITS, "associations"}):
            return None
        here = f"cluster={configuration.cluster}"
        try:
            user = f"name={pwd.getpwuid(os.getuid()).pw_name}"
        except KeyError:
            # a container without this user
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
        """Return a command's output, cached for `lasts` seconds; None: it failed."""
        now = self._commands.monotonic()
        until, output = self._answers.get(words, (now, None))
        if now < until:
            return output
        try:
            output = self._commands.call(words)
        except (SchedulerUnreachable, CommandRefused, UserError):
            output = None
        seconds = _LIMITS_QUERIES * self._query_seconds if lasts is None else lasts
        self._answers[words] = (now + (self._query_seconds if output is None else seconds), output)
        return output


def room_for_workers(room: int | None) -> int | None:
    """Return how many of the `room` free places in the queue workers may take."""
    return None if room is None else max(0, room - _RESERVED)


def _configured_place(flags: Mapping[str, object]) -> Place:
    """Return the account, QOS and partition of the options, else of the environment."""
    environment = clean_environment(configured=tuple(flags))
    named = {
        option: str(flags.get(option) or environment.get(f"SBATCH_{option.upper()}", ""))
        for option in ("account", "qos", "partition")
    }
    return Place(**named)


def _request(flags: Mapping[str, object], survey: Survey) -> Request | None:
    """Return the resources that a task asks for; None: only Slurm can tell."""
    assert survey.configuration
    if "reservation" in flags:
        return None
    partition = survey.partitions[0] if survey.partitions else None
    try:
        return slurm_nodes.request(flags, survey.configuration, partition)
    except ValueError:
        return None


def _max_parallel(allowed: Allowed, request: Request | None, max_parallel: int) -> int:
    limits = [max_parallel]
    if allowed.max_running is not None:
        limits.append(allowed.max_running)
    for name, amount in request.tres().items() if request else ():
        if amount and name in allowed.max_tres:
            limits.append(int(allowed.max_tres[name] // amount))
    # at least 1: sbatch refuses a task that is over a limit by itself
    return max(1, min(limits))
