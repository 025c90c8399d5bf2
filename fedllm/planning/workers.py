"""How many workers an attempt has, for how long, and what they take: the geometry of a round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.models import SbatchOptions, SchedulerSection
from fedllm.errors import ConfigError
from fedllm.planning.bundles import cut_bundles
from fedllm.planning.capacity import Capacity
from fedllm.planning.costs import CostModel
from fedllm.planning.grouping import ClientGroup
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.sbatch_options import by_flag, time_minutes
from fedllm.storage.records import BundleRecord

# Loading the base and whatever a cluster's start-up takes, before anything was timed.
STARTUP_SECONDS = 120.0
# A limit that is met costs a requeue; one that is too long costs places in the queue.
_MARGIN = 1.5
_MARGIN_BEFORE_MEASURED = 3.0
_LEAST_MINUTES = 5.0
_LEAST_MINUTES_BEFORE_MEASURED = 15.0


@dataclass(frozen=True, kw_only=True)
class ClassPlan:
    """The workers of a class and their bundles.

    `options` hold the time limit that is asked for, `minutes` says it too; None: nothing limits
    them.
    """

    worker_class: str
    workers: int
    parallel: int
    minutes: float | None
    options: SbatchOptions
    bundles: list[BundleRecord]

    @property
    def seconds(self) -> float:
        """The estimated seconds of all bundles."""
        return math.fsum(bundle.cost for bundle in self.bundles)


def plan_classes(
    groups: Sequence[ClientGroup],
    classes: Mapping[str, str],
    *,
    costs: CostModel,
    capacities: Mapping[str, Capacity],
    options: Mapping[str, SbatchOptions],
    section: SchedulerSection,
    startup_seconds: float = STARTUP_SECONDS,
) -> list[ClassPlan]:
    """Plan the workers and bundles of every class that has groups to train, sorted by name.

    Slots are shared among classes by work. A class gets workers for `target_minutes` of work
    each, but no fewer than there are free slots while each has `worker_minutes_min`.

    Args:
        groups: who is to train, and together with whom.
        classes: tier -> class.
        costs: how long clients take.
        capacities: class -> what there is room for.
        options: class -> its sbatch options.
        section: the scheduler's configuration.
        startup_seconds: what a worker needs before it trains.

    Raises:
        ConfigError: a `time` that sbatch would not take.
    """
    members: dict[str, list[ClientGroup]] = {}
    for group in groups:
        members.setdefault(classes[group.tier], []).append(group)
    seconds = {
        name: math.fsum(costs.seconds(client) for group in mine for client in group.members)
        for name, mine in members.items()
    }
    parallel = _parallel(seconds, {name: len(mine) for name, mine in members.items()}, capacities)
    plans: list[ClassPlan] = []
    first = 0
    for name, mine in sorted(members.items()):
        workers = _workers(seconds[name], parallel[name], capacities[name], section)
        size = section.clients_per_bundle
        if section.clients_per_task != "auto":
            size = section.clients_per_task
        bundles = cut_bundles(
            mine,
            worker_class=name,
            seconds=costs.seconds,
            workers=min(workers, parallel[name]),
            clients_per_bundle=size,
            target_seconds=60.0 * section.target_minutes,
            first=first,
        )
        first += len(bundles)
        workers = min(workers, len(bundles))
        if section.clients_per_task != "auto":
            workers = len(bundles)
        longest = max([seconds[name] / workers, *(bundle.cost for bundle in bundles)])
        given = options[name]
        minutes = _configured_minutes(name, given)
        if minutes is None and not capacities[name].resident and not _has_time(given):
            minutes = _minutes(longest + startup_seconds, costs, capacities[name], section)
            given = {**given, "time": math.ceil(minutes)}
        plans.append(
            ClassPlan(
                worker_class=name,
                workers=workers,
                parallel=min(workers, parallel[name]),
                minutes=minutes,
                options=given,
                bundles=bundles,
            )
        )
    return plans


def _parallel(
    seconds: Mapping[str, float], counts: Mapping[str, int], room: Mapping[str, Capacity]
) -> dict[str, int]:
    """Share the slots among classes by work, at least one each.

    What a class cannot use, having few groups or little room, goes to the others.
    """
    slots = max(room[name].max_parallel for name in seconds)
    most = {name: max(1, min(counts[name], room[name].max_parallel)) for name in seconds}
    work = {name: value or 1.0 for name, value in seconds.items()}
    parallel: dict[str, int] = {}
    while work:
        others = max(0, slots - sum(parallel.values()) - len(work))
        wanted = {name: 1 + more for name, more in largest_remainder(work, others).items()}
        full = [name for name in work if wanted[name] >= most[name]]
        parallel |= {name: min(most[name], wanted[name]) for name in full or work}
        work = {name: value for name, value in work.items() if name not in parallel}
    return parallel


def _workers(seconds: float, parallel: int, room: Capacity, section: SchedulerSection) -> int:
    if room.resident:
        return parallel
    by_target = math.ceil(seconds / (60.0 * section.target_minutes))
    worth_it = int(seconds / (60.0 * section.worker_minutes_min))
    return max(1, by_target, min(parallel, room.free_slots, worth_it))


def _minutes(seconds: float, costs: CostModel, room: Capacity, section: SchedulerSection) -> float:
    margin, least = (
        (_MARGIN, _LEAST_MINUTES)
        if costs.calibrated
        else (_MARGIN_BEFORE_MEASURED, _LEAST_MINUTES_BEFORE_MEASURED)
    )
    minutes = max(least, math.ceil(margin * seconds / 60.0))
    if section.linger_minutes:
        minutes = math.ceil(max(minutes, section.target_minutes) + section.linger_minutes)
    return minutes if room.max_minutes is None else min(minutes, room.max_minutes)


def _has_time(options: SbatchOptions) -> bool:
    return "time" in by_flag(options)


def _configured_minutes(worker_class: str, options: SbatchOptions) -> float | None:
    given = by_flag(options).get("time")
    try:
        return time_minutes(given)
    except ValueError as error:
        raise ConfigError(
            f"scheduler.sbatch: time of class {worker_class}: got {given!r}, need minutes "
            "or [days-]hours:minutes:seconds"
        ) from error


def next_arrays(
    wanted: Mapping[str, int],
    *,
    largest: Mapping[str, int],
    rooms: Mapping[str, int | None],
) -> dict[str, list[int]]:
    """Return the sizes of the arrays that each class may submit now.

    Args:
        wanted: class -> tasks that are still to be submitted.
        largest: class -> tasks that one array may have.
        rooms: class -> tasks that limits on submitted jobs leave room for; None: any number.
            Classes of equal room share it, and what one takes is taken from those with more.
    """
    counts = {name: count for name, count in wanted.items() if count > 0}
    limited: dict[int, list[str]] = {}
    for name in counts:
        room = rooms[name]
        if room is not None:
            limited.setdefault(room, []).append(name)
    taken = 0
    for room, names in sorted(limited.items()):
        shares = {name: float(counts[name]) for name in names}
        if sum(shares.values()) > room - taken:
            counts |= largest_remainder(shares, max(0, room - taken))
        taken += sum(counts[name] for name in names)
    return {name: _split(count, largest[name]) for name, count in counts.items() if count}


def _split(tasks: int, largest: int) -> list[int]:
    whole, rest = divmod(tasks, largest)
    return [largest] * whole + [rest] * bool(rest)
