"""How long a round takes for a number of slots: bundles claimed longest first by free workers."""

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
    """A round's training on so many slots: its workers, and minutes until the last one ends."""

    slots: int
    tasks: int
    minutes: float


def startup_seconds(capacities: Mapping[str, Capacity]) -> float:
    """Return what a worker needs before it trains; one that is there anyway needs nothing."""
    resident = all(room.resident for room in capacities.values())
    return 0.0 if resident else STARTUP_SECONDS


def round_seconds(classes: Sequence[ClassPlan], *, startup: float, one_bundle: bool) -> float:
    """Return how long the classes train side by side, the start of workers included."""
    return max((_class_seconds(each, startup, one_bundle) for each in classes), default=0.0)


def _class_seconds(plan: ClassPlan, startup: float, one_bundle: bool) -> float:
    # with a task for each bundle every one of them starts anew
    each = startup if one_bundle else 0.0
    free_at = [startup - each] * min(plan.parallel, len(plan.bundles))
    for cost in sorted((bundle.cost for bundle in plan.bundles), reverse=True):
        heapq.heapreplace(free_at, free_at[0] + each + cost)
    return max(free_at)


def times_for_slots(
    federation: Federation,
    cohort: Sequence[CohortClient],
    capacities: Mapping[str, Capacity],
    options: Mapping[str, Options],
    slots: Sequence[int],
) -> tuple[SlotsPlan, ...]:
    """Return how long a round takes for several numbers of free slots."""
    config = federation.config
    found = []
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
            options={name: dict(given) for name, given in options.items()},
            section=config.scheduler,
        )
        seconds = round_seconds(
            classes, startup=startup_seconds(rooms), one_bundle=_one_bundle(config)
        )
        tasks = sum(each.workers for each in classes)
        found.append(SlotsPlan(slots=number, tasks=tasks, minutes=seconds / 60))
    return tuple(found)


def _one_bundle(config: Config) -> bool:
    return config.scheduler.clients_per_task != "auto"
