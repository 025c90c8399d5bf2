"""Time that a round takes on a number of slots: free workers claim the longest bundle first."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.config.models import Config
from fedllm.planning.capacity import Capacity
from fedllm.planning.federation import Federation
from fedllm.planning.workers import STARTUP_SECONDS, ClassPlan, plan_classes
from fedllm.reporting.usage import Options
from fedllm.storage.records import CohortClient


@dataclass(frozen=True, kw_only=True)
class SlotsPlan:
    """The training of a round on `slots` slots: its workers, and minutes until the last ends."""

    slots: int
    tasks: int
    minutes: float


def startup_seconds(capacities: Mapping[str, Capacity]) -> float:
    """Return the seconds a worker needs before it trains; 0 if all workers run already."""
    resident = all(room.resident for room in capacities.values())
    return 0.0 if resident else STARTUP_SECONDS


def round_seconds(classes: Sequence[ClassPlan], *, startup: float, one_bundle: bool) -> float:
    """Return the time in which the classes train side by side, including the start of workers."""
    return max((_class_seconds(item, startup, one_bundle) for item in classes), default=0.0)


def _class_seconds(plan: ClassPlan, startup: float, one_bundle: bool) -> float:
    # with one task per bundle, every bundle waits for a worker's start
    restart_seconds = startup if one_bundle else 0.0
    free_at = [startup - restart_seconds] * min(plan.parallel, len(plan.bundles))
    for cost in sorted((bundle.cost for bundle in plan.bundles), reverse=True):
        heapq.heapreplace(free_at, free_at[0] + restart_seconds + cost)
    return max(free_at)


def times_for_slots(
    federation: Federation,
    cohort: Sequence[CohortClient],
    capacities: Mapping[str, Capacity],
    options: Mapping[str, Options],
    slots: Sequence[int],
) -> tuple[SlotsPlan, ...]:
    """Return the time of a round for each number of free slots."""
    config = federation.config
    plans = []
    for number in slots:
        rooms = {
            name: replace(room, free_slots=number, max_parallel=number)
            for name, room in capacities.items()
        }
        classes = plan_classes(
            federation.groups(cohort),
            federation.classes,
            costs=federation.seed_costs(),
            capacities=rooms,
            options={name: dict(flags) for name, flags in options.items()},
            section=config.scheduler,
        )
        seconds = round_seconds(
            classes, startup=startup_seconds(rooms), one_bundle=_one_bundle(config)
        )
        tasks = sum(item.workers for item in classes)
        plans.append(SlotsPlan(slots=number, tasks=tasks, minutes=seconds / 60))
    return tuple(plans)


def _one_bundle(config: Config) -> bool:
    return config.scheduler.clients_per_task != "auto"
