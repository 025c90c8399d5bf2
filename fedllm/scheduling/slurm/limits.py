"""What Slurm's accounting allows a user: limits on tasks queued and running, and on their time.

Pure: texts of `scontrol` and `sacctmgr` in, limits out. Of limits of one sort, that of the
partition's QOS comes before that of the job's QOS, and that before the association's
(https://slurm.schedmd.com/resource_limits.html, "Hierarchy").
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.planning.sbatch_options import time_minutes
from fedllm.scheduling.slurm.notation import counts, entities, number, rows, settings

# columns as they are asked for
USER_COLUMNS = (
    *("User", "DefaultAccount", "Account", "Partition", "DefaultQOS", "QOS"),
    *("MaxJobs", "MaxSubmitJobs", "GrpJobs", "GrpSubmitJobs", "MaxWall", "GrpTRES"),
)
ACCOUNT_COLUMNS = ("Account", "ParentName", "GrpJobs", "GrpSubmitJobs", "GrpTRES")
QOS_COLUMNS = (
    *("Name", "MaxJobsPU", "MaxSubmitPU", "MaxJobsPA", "MaxSubmitPA", "GrpJobs", "GrpSubmit"),
    *("MaxWall", "MaxTRESPU", "MaxTRESPA", "GrpTRES"),
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What `scontrol show config` says, as far as it matters here."""

    cluster: str
    max_array_size: int
    enforced: frozenset[str]
    selects: frozenset[str]
    default_memory: Mapping[str, str]
    max_array_tasks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A line of `scontrol show partition`."""

    name: str
    is_default: bool
    max_minutes: float | None
    qos: str
    default_memory: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SlurmLimits:
    """A row's limits on tasks; None: none. `tres`: cpu, mem in MiB, node, gres/gpu of them all."""

    running: int | None = None
    queued: int | None = None
    account_running: int | None = None
    account_queued: int | None = None
    group_running: int | None = None
    group_queued: int | None = None
    minutes: float | None = None
    user_tres: Mapping[str, float] = field(default_factory=dict)
    account_tres: Mapping[str, float] = field(default_factory=dict)
    group_tres: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Association:
    """What one user may do under one account, in one partition if it names one."""

    account: str
    partition: str
    default_qos: str
    qos: tuple[str, ...]
    is_default: bool
    limits: SlurmLimits


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """The associations of this user, all accounts with their parents, and all QOS."""

    associations: Sequence[Association] = ()
    parents: Mapping[str, str] = field(default_factory=dict)
    accounts: Mapping[str, SlurmLimits] = field(default_factory=dict)
    qos: Mapping[str, SlurmLimits] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a job is counted; what is empty is not known, or not there."""

    account: str = ""
    qos: str = ""
    partition: str = ""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A limit on the number of tasks whose place matches."""

    max_tasks: int
    place: Place


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What a job of one place may do: all limits together."""

    queued: tuple[Bound, ...] = ()
    max_running: int | None = None
    max_minutes: float | None = None
    max_tres: Mapping[str, float] = field(default_factory=dict)


_Ranked = tuple[SlurmLimits, Place]


def configuration(said: str) -> Configuration:
    """Read `scontrol show config`."""
    found = settings(said)
    most = re.search(r"max_array_tasks=(\d+)", found.get("SchedulerParameters", ""))
    return Configuration(
        cluster=found.get("ClusterName", ""),
        max_array_size=number(found.get("MaxArraySize", "")) or 1001,
        enforced=frozenset(found.get("AccountingStorageEnforce", "none").lower().split(",")),
        selects=frozenset(found.get("SelectTypeParameters", "").upper().split(",")),
        default_memory=_default_memory(found),
        max_array_tasks=int(most[1]) if most else None,
    )


def partitions(said: str) -> dict[str, Partition]:
    """Read `scontrol --oneliner show partition`."""
    return {
        name: Partition(
            name=name,
            is_default=words.get("Default") == "YES",
            max_minutes=time_minutes(words.get("MaxTime", "")),
            qos=words.get("QoS", "").replace("N/A", ""),
            default_memory=_default_memory(words),
        )
        for name, words in entities(said, "PartitionName").items()
    }


def _default_memory(found: Mapping[str, str]) -> dict[str, str]:
    keys = {"DefMemPerNode": "mem", "DefMemPerCPU": "mem-per-cpu"}
    return {option: found[key] for key, option in keys.items() if found.get(key, "").isdecimal()}


def accounting(users: str, accounts: str, qos: str) -> Accounting:
    """Read the three tables of `sacctmgr`, with the columns named here."""
    parents = {}
    groups = {}
    for row in rows(accounts, ACCOUNT_COLUMNS):
        parents[row["Account"]] = row["ParentName"]
        groups[row["Account"]] = _association_limits({**row, "MaxWall": ""})
    return Accounting(
        associations=tuple(_associations(users)),
        parents=parents,
        accounts=groups,
        qos={row["Name"]: _qos_limits(row) for row in rows(qos, QOS_COLUMNS)},
    )


def _associations(said: str) -> Iterator[Association]:
    for row in rows(said, USER_COLUMNS):
        yield Association(
            account=row["Account"],
            partition=row["Partition"],
            default_qos=row["DefaultQOS"],
            qos=tuple(filter(None, row["QOS"].split(","))),
            is_default=row["Account"] == row["DefaultAccount"],
            limits=_association_limits(row),
        )


def _association_limits(row: Mapping[str, str]) -> SlurmLimits:
    return SlurmLimits(
        running=number(row.get("MaxJobs", "")),
        queued=number(row.get("MaxSubmitJobs", "")),
        group_running=number(row["GrpJobs"]),
        group_queued=number(row["GrpSubmitJobs"]),
        minutes=time_minutes(row["MaxWall"]),
        group_tres=counts(row["GrpTRES"]),
    )


def _qos_limits(row: Mapping[str, str]) -> SlurmLimits:
    return SlurmLimits(
        running=number(row["MaxJobsPU"]),
        queued=number(row["MaxSubmitPU"]),
        account_running=number(row["MaxJobsPA"]),
        account_queued=number(row["MaxSubmitPA"]),
        group_running=number(row["GrpJobs"]),
        group_queued=number(row["GrpSubmit"]),
        minutes=time_minutes(row["MaxWall"]),
        user_tres=counts(row["MaxTRESPU"]),
        account_tres=counts(row["MaxTRESPA"]),
        group_tres=counts(row["GrpTRES"]),
    )


def place_of(place: Place, known: Accounting) -> tuple[Place, Association | None]:
    """Return where a job is counted that names what `place` names, and its association."""
    own = next((a.account for a in known.associations if a.is_default), "")
    account = place.account or own
    # one for the partition comes before one for all
    fitting = [
        a
        for a in known.associations
        if a.account == account and a.partition in {"", place.partition}
    ]
    association = max(fitting, key=lambda a: a.partition, default=None)
    qos = place.qos
    if association and not qos:
        allowed = association.qos
        alone = allowed[0] if len(allowed) == 1 else ""
        qos = association.default_qos or alone or ("normal" if "normal" in allowed else "")
    return Place(account=account, qos=qos, partition=place.partition), association


def allowed(place: Place, partition_qos: str, known: Accounting) -> Allowed:
    """Return what a job that names what `place` names may do."""
    place, association = place_of(place, known)
    ranked = [
        (known.qos[name], where)
        for name, where in (
            (partition_qos, Place(partition=place.partition)),
            (place.qos, Place(qos=place.qos)),
        )
        if name in known.qos
    ]
    own = []
    if association:
        own = [(association.limits, Place(account=place.account, partition=association.partition))]
    above = [(known.accounts[name], Place(account=place.account)) for name in _above(place, known)]
    sorts: tuple[tuple[str, list[_Ranked]], ...] = (
        ("", own),
        ("account_", []),
        ("group_", [*own, *above]),
    )
    running = [
        bound.max_tasks for sort, last in sorts for bound in _bounds(f"{sort}running", ranked, last)
    ]
    return Allowed(
        queued=tuple(b for sort, last in sorts for b in _bounds(f"{sort}queued", ranked, last)),
        max_running=min(running, default=None),
        max_minutes=_first([limits.minutes for limits, _ in [*ranked, *own]]),
        max_tres=_tres([limits for limits, _ in [*ranked, *own, *above]]),
    )


def room(allowed: Allowed, queued: Mapping[Place, int]) -> int | None:
    """Return how many more tasks may be queued, or None if nothing limits them."""
    return min(
        (
            bound.max_tasks
            - sum(count for each, count in queued.items() if _matches(each, bound.place))
            for bound in allowed.queued
        ),
        default=None,
    )


def _matches(each: Place, of: Place) -> bool:
    """Say whether a job counts; one of which nothing is known yet does."""
    if each == Place():
        return True
    return (
        of.account in {"", each.account}
        and of.qos in {"", each.qos}
        and (not of.partition or of.partition in each.partition.split(","))
    )


def _bounds(sort: str, ranked: Sequence[_Ranked], last: Sequence[_Ranked]) -> list[Bound]:
    """Return the first limit of a sort that a QOS has, else all that associations have."""
    found = [(getattr(limits, sort), place) for limits, place in ranked]
    first = [Bound(max_tasks=n, place=place) for n, place in found if n is not None][:1]
    found = [(getattr(limits, sort), place) for limits, place in last]
    return first or [Bound(max_tasks=n, place=place) for n, place in found if n is not None]


def _tres(ranked: Sequence[SlurmLimits]) -> dict[str, float]:
    """Return how much of each resource all tasks together may use."""
    most: dict[str, float] = {}
    for sort in ("user_tres", "account_tres", "group_tres"):
        first: dict[str, float] = {}
        for limits in ranked:
            first = {**getattr(limits, sort), **first}
        for name, amount in first.items():
            most[name] = min(amount, most.get(name, amount))
    return most


def _above(place: Place, known: Accounting) -> Iterator[str]:
    """Return the account and those that it belongs to."""
    name = place.account
    while name in known.accounts:
        yield name
        name = known.parents[name]


def _first(values: Sequence[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)
