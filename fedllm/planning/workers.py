"""Workers of an attempt: their number, time limits and bundles."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.models import SbatchOptions, SchedulerSection
from fedllm.errors import ConfigError
from fedllm.planning.bundles import cut_bundles
from fedllm.planning.capacity import Capacity
from fedllm.planning.costs import CostModel
from fedllm.planning.engines import ClientGroup
from fedllm.planning.option_spelling import by_flag, time_minutes
from fedllm.planning.quotas import largest_remainder
from fedllm.storage.records import BundleRecord

# Time to start a task and load the base, before any round was measured.
STARTUP_SECONDS = 120.0
# Too short a time limit costs a requeue; too long a one costs places in the queue.
_MARGIN = 1.5
_MARGIN_BEFORE_MEASURED = 3.0
_MIN_MINUTES = 5.0
_MIN_MINUTES_BEFORE_MEASURED = 15.0


@dataclass(frozen=True, kw_only=True)
class ClassPlan:
    """The workers of a class and their bundles.

    `minutes` is the time limit of a worker, which `options` hold too; None: there is no limit.
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

    Classes share the slots in proportion to their work. A class gets as many workers as have
    `target_minutes` of work each. It gets more if slots are free, as long as each worker has
    `worker_minutes_min` of work.

    Args:
        groups: groups of clients to train.
        classes: tier -> class.
        costs: seconds of training of clients.
        capacities: class -> capacity of the scheduler.
        options: class -> its sbatch options.
        section: configuration of the scheduler.
        startup_seconds: time that a worker needs before it trains.

    Raises:
        ConfigError: an option `time` has a form that sbatch does not accept.
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
        flags = options[name]
        minutes = _configured_minutes(name, flags)
        if minutes is None and not capacities[name].resident and not _has_time(flags):
            minutes = _minutes(longest + startup_seconds, costs, capacities[name], section)
            flags = {**flags, "time": math.ceil(minutes)}
        plans.append(
            ClassPlan(
                worker_class=name,
                workers=workers,
                parallel=min(workers, parallel[name]),
                minutes=minutes,
                options=flags,
                bundles=bundles,
            )
        )
    return plans


def _parallel(
    seconds: Mapping[str, float], counts: Mapping[str, int], room: Mapping[str, Capacity]
) -> dict[str, int]:
    """Share the slots among classes in proportion to their work, at least one each.

    Slots that a class cannot use, as it has few groups or little room, go to the others.
    """
    slots = max(room[name].max_parallel for name in seconds)
    limits = {name: max(1, min(counts[name], room[name].max_parallel)) for name in seconds}
    work = {name: value or 1.0 for name, value in seconds.items()}
    parallel: dict[str, int] = {}
    while work:
        others = max(0, slots - sum(parallel.values()) - len(work))
        shares = {name: 1 + more for name, more in largest_remainder(work, others).items()}
        full = [name for name in work if shares[name] >= limits[name]]
        parallel |= {name: min(limits[name], shares[name]) for name in full or work}
        work = {name: value for name, value in work.items() if name not in parallel}
    return parallel


def _workers(seconds: float, parallel: int, room: Capacity, section: SchedulerSection) -> int:
    if room.resident:
        return parallel
    by_target = math.ceil(seconds / (60.0 * section.target_minutes))
    by_min_work = int(seconds / (60.0 * section.worker_minutes_min))
    return max(1, by_target, min(parallel, room.free_slots, by_min_work))


def _minutes(seconds: float, costs: CostModel, room: Capacity, section: SchedulerSection) -> float:
    margin, min_minutes = (
        (_MARGIN, _MIN_MINUTES)
        if costs.calibrated
        else (_MARGIN_BEFORE_MEASURED, _MIN_MINUTES_BEFORE_MEASURED)
    )
    minutes = max(min_minutes, math.ceil(margin * seconds / 60.0))
    if section.linger_minutes:
        minutes = math.ceil(max(minutes, section.target_minutes) + section.linger_minutes)
    return minutes if room.max_minutes is None else min(minutes, room.max_minutes)


def _has_time(options: SbatchOptions) -> bool:
    return "time" in by_flag(options)


def _configured_minutes(worker_class: str, options: SbatchOptions) -> float | None:
    time = by_flag(options).get("time")
    try:
        return time_minutes(time)
    except ValueError as error:
        raise ConfigError(
            f"scheduler.sbatch: time of class {worker_class}: got {time!r}, need minutes "
            "or [days-]hours:minutes:seconds"
        ) from error


def next_arrays(
    tasks: Mapping[str, int],
    *,
    largest: Mapping[str, int],
    rooms: Mapping[str, int | None],
) -> dict[str, list[int]]:
    """Return class -> sizes of the arrays that it may submit now.

    Args:
        tasks: class -> number of tasks that are still to be submitted.
        largest: class -> largest number of tasks of one array.
        rooms: class -> number of tasks that limits on submitted jobs allow now; None: any number.
            Classes of equal room share one limit; their tasks count against larger rooms too.
    """
    counts = {name: count for name, count in tasks.items() if count > 0}
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
