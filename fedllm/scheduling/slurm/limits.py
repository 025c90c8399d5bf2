"""Limits of Slurm's accounting for a user: on queued and running tasks, and on their time.

Pure: output of `scontrol` and `sacctmgr` in, limits out. Of the limits of one kind, that of the
partition's QOS comes before that of the job's QOS, which comes before that of the association
(https://slurm.schedmd.com/resource_limits.html, "Hierarchy").
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedllm.planning.option_spelling import time_minutes
from fedllm.scheduling.slurm.notation import counts, entities, number, rows, settings

# the columns that we request
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
    """The settings of `scontrol show config` that are used here."""

    cluster: str
    max_array_size: int
    enforced: frozenset[str]
    selects: frozenset[str]
    default_memory: Mapping[str, str]
    max_array_tasks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition, from its line of `scontrol show partition`."""

    name: str
    is_default: bool
    max_minutes: float | None
    qos: str
    default_memory: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SlurmLimits:
    """Limits of one row of the accounting; None: no limit.

    `tres`: the sum over all tasks of cpu, mem in MiB, node and gres/gpu.
    """

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
    """The rights of a user under one account, in one partition if it names one."""

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
    """The account, QOS and partition that a job counts for; empty: unknown, or none."""

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
    """The limits on a job of one place, all kinds together."""

    queued: tuple[Bound, ...] = ()
    max_running: int | None = None
    max_minutes: float | None = None
    max_tres: Mapping[str, float] = field(default_factory=dict)


_Ranked = tuple[SlurmLimits, Place]


def configuration(output: str) -> Configuration:
    """Read `scontrol show config`."""
    values = settings(output)
    tasks = re.search(r"max_array_tasks=(\d+)", values.get("SchedulerParameters", ""))
    return Configuration(
        cluster=values.get("ClusterName", ""),
        max_array_size=number(values.get("MaxArraySize", "")) or 1001,
        enforced=frozenset(values.get("AccountingStorageEnforce", "none").lower().split(",")),
        selects=frozenset(values.get("SelectTypeParameters", "").upper().split(",")),
        default_memory=_default_memory(values),
        max_array_tasks=int(tasks[1]) if tasks else None,
    )


def partitions(output: str) -> dict[str, Partition]:
    """Read `scontrol --oneliner show partition`."""
    return {
        name: Partition(
            name=name,
            is_default=words.get("Default") == "YES",
            max_minutes=time_minutes(words.get("MaxTime", "")),
            qos=words.get("QoS", "").replace("N/A", ""),
            default_memory=_default_memory(words),
        )
        for name, words in entities(output, "PartitionName").items()
    }


def _default_memory(values: Mapping[str, str]) -> dict[str, str]:
    keys = {"DefMemPerNode": "mem", "DefMemPerCPU": "mem-per-cpu"}
    return {option: values[key] for key, option in keys.items() if values.get(key, "").isdecimal()}


def accounting(users: str, accounts: str, qos: str) -> Accounting:
    """Read the three tables of `sacctmgr`, with the columns listed above."""
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


def _associations(users: str) -> Iterator[Association]:
    for row in rows(users, USER_COLUMNS):
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
    """Return the place that a job with the options `place` counts for, and its association."""
    default = next((a.account for a in known.associations if a.is_default), "")
    account = place.account or default
    # an association with the partition comes before one without
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
    """Return the limits on a job with the options `place`."""
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
    kinds: tuple[tuple[str, list[_Ranked]], ...] = (
        ("", own),
        ("account_", []),
        ("group_", [*own, *above]),
    )
    running = [
        bound.max_tasks for kind, last in kinds for bound in _bounds(f"{kind}running", ranked, last)
    ]
    return Allowed(
        queued=tuple(b for kind, last in kinds for b in _bounds(f"{kind}queued", ranked, last)),
        max_running=min(running, default=None),
        max_minutes=_first([limits.minutes for limits, _ in [*ranked, *own]]),
        max_tres=_tres([limits for limits, _ in [*ranked, *own, *above]]),
    )


def room(allowed: Allowed, queued: Mapping[Place, int]) -> int | None:
    """Return how many more tasks may be queued; None: no limit."""
    return min(
        (
            bound.max_tasks
            - sum(count for place, count in queued.items() if _matches(place, bound.place))
            for bound in allowed.queued
        ),
        default=None,
    )


def _matches(place: Place, limited: Place) -> bool:
    """Say whether jobs of a place count for a limit; jobs of an unknown place do."""
    if place == Place():
        return True
    return (
        limited.account in {"", place.account}
        and limited.qos in {"", place.qos}
        and (not limited.partition or limited.partition in place.partition.split(","))
    )


def _bounds(kind: str, ranked: Sequence[_Ranked], last: Sequence[_Ranked]) -> list[Bound]:
    """Return the first limit of a kind that a QOS has, else all those of associations."""
    values = [(getattr(limits, kind), place) for limits, place in ranked]
    first = [Bound(max_tasks=n, place=place) for n, place in values if n is not None][:1]
    values = [(getattr(limits, kind), place) for limits, place in last]
    return first or [Bound(max_tasks=n, place=place) for n, place in values if n is not None]


def _tres(ranked: Sequence[SlurmLimits]) -> dict[str, float]:
    """Return how much of each resource all tasks together may use."""
    max_tres: dict[str, float] = {}
    for kind in ("user_tres", "account_tres", "group_tres"):
        first: dict[str, float] = {}
        for limits in ranked:
            first = {**getattr(limits, kind), **first}
        for name, amount in first.items():
            max_tres[name] = min(amount, max_tres.get(name, amount))
    return max_tres


def _above(place: Place, known: Accounting) -> Iterator[str]:
    """Yield the account and its parents."""
    name = place.account
    while name in known.accounts:
        yield name
        name = known.parents[name]


def _first(values: Sequence[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)
