"""Attempts of a round: one plan for all missing clients, with workers and bundles."""

import os
from collections.abc import Sequence

from fedllm.config.models import SbatchOptions
from fedllm.errors import counted
from fedllm.planning.classes import tier_options
from fedllm.planning.costs import CostModel, calibrate
from fedllm.planning.engines import ClientGroup, engine_of
from fedllm.planning.federation import Federation
from fedllm.planning.option_spelling import flag_name
from fedllm.planning.workers import STARTUP_SECONDS, ClassPlan, plan_classes
from fedllm.rounds.dispatch.idle_workers import find_idle_workers
from fedllm.rounds.dispatch.submissions import array_name, submit
from fedllm.rounds.dispatch.waves import next_wave
from fedllm.rounds.dispatch.worker_failures import excluded_nodes, memory_factor, with_memory
from fedllm.rounds.run import Run
from fedllm.scheduling.log_names import MAX_LOGS
from fedllm.scheduling.seam import Capacity, TaskSize
from fedllm.storage.records import (
    CohortClient,
    CohortRecord,
    CollectionRecord,
    SubmissionRecord,
    WorkersRecord,
)


def start_attempt(
    run: Run,
    federation: Federation,
    cohort: CohortRecord,
    missing: Sequence[CohortClient],
    number: int,
) -> None:
    """Plan an attempt for the missing clients; submit as many workers as there is room for."""
    paths = run.paths.round(cohort.round)
    groups = _missing_groups(federation, cohort, missing)
    present = {federation.classes[group.tier] for group in groups}
    sbatch = run.config.scheduler.sbatch
    factors = {name: memory_factor(run, paths, number - 1, name) for name in sorted(present)}
    configured = {name: tier_options(sbatch, name) for name in factors}
    options = {
        name: with_memory(run, name, configured[name], factor) for name, factor in factors.items()
    }
    same_memory = {name for name in options if options[name] == configured[name]}
    excluded = excluded_nodes(run, paths, number - 1)
    if excluded:
        options = {name: _excluding(flags, excluded) for name, flags in options.items()}
    sizes = {name: federation.engines[name].size for name in options}
    capacities = {
        name: run.scheduler.capacity(flags, sizes[name]) for name, flags in options.items()
    }
    before = run.known_records.find(CollectionRecord, paths.previous.collection)
    classes = plan_classes(
        groups,
        federation.classes,
        costs=_measured_costs(federation, before),
        capacities=capacities,
        options=options,
        section=run.config.scheduler,
        startup_seconds=_startup_seconds(before),
    )
    idle = find_idle_workers(run, paths, excluded_nodes=excluded)
    # a running worker cannot get more memory, so it is not taken over where more is needed
    adopted = {
        c.worker_class: idle.get(c.worker_class, [])[: c.workers]
        if c.worker_class in same_memory
        else []
        for c in classes
    }
    plan = SubmissionRecord(
        token=array_name(run.record.run_id, cohort.round, "train", f"a{number:02d}"),
        lease=run.lease.number,
        kind="client",
        command=[str(paths.attempt(number).root)],
        arrays=[],
        bundles=[bundle for c in classes for bundle in c.bundles],
        workers={
            c.worker_class: workers_record(
                c,
                capacities[c.worker_class],
                sizes[c.worker_class],
                adopted=len(adopted[c.worker_class]),
                memory_factor=factors[c.worker_class],
            )
            for c in classes
        },
        adopted=[task for tasks in adopted.values() for task in tasks],
        one_bundle=run.config.scheduler.clients_per_task != "auto",
        excluded_nodes=excluded,
        user=os.geteuid(),
    )
    plan = plan.model_copy(update={"arrays": next_wave(run, plan)})
    run.say(f"round {cohort.round}/{run.config.rounds}: {_describe(plan, len(missing), number)}")
    submit(run, paths.attempt(number), plan, run.paths.logs(cohort.round))


def _missing_groups(
    federation: Federation, cohort: CohortRecord, missing: Sequence[CohortClient]
) -> list[ClientGroup]:
    """Return the groups with missing members; each of them trains again as a whole."""
    done = {client.id for client in cohort.clients} - {client.id for client in missing}
    groups = engine_of(federation.config.training).groups(cohort.clients, cohort.ranks)
    rest = (group.without(done) for group in groups)
    return [group for group in rest if group.missing]


def _measured_costs(federation: Federation, before: CollectionRecord | None) -> CostModel:
    """Return the cost model, measured by the round before where there is one."""
    seeded = federation.seed_costs()
    return calibrate(seeded, before.tiers) if before else seeded


def _startup_seconds(before: CollectionRecord | None) -> float:
    measured = before.startup_seconds if before else None
    return STARTUP_SECONDS if measured is None else measured


def workers_record(
    plan: ClassPlan,
    capacity: Capacity,
    size: TaskSize,
    *,
    adopted: int = 0,
    memory_factor: float = 1.0,
) -> WorkersRecord:
    """Return the record of the workers of a class to submit, `adopted` ones not counted."""
    return WorkersRecord(
        tasks=plan.workers - adopted,
        parallel=max(1, plan.parallel - adopted),
        largest_array=min(capacity.largest_array, MAX_LOGS),
        memory_factor=memory_factor,
        minutes=plan.minutes,
        options=plan.options,
        processes=size.processes,
        nodes=size.nodes,
    )


def _excluding(options: SbatchOptions, nodes: Sequence[str]) -> SbatchOptions:
    key = next((key for key in options if flag_name(key) == "exclude"), "exclude")
    return {**options, key: ",".join([*filter(None, [str(options.get(key) or "")]), *nodes])}


def _describe(plan: SubmissionRecord, clients: int, number: int) -> str:
    workers = sum(record.tasks for record in plan.workers.values())
    sent = sum(array.tasks for array in plan.arrays)
    lines = (
        f"{counted(clients, 'client')} in {counted(len(plan.bundles), 'bundle')} for "
        f"{counted(workers, 'worker')}",
        f"{len(plan.adopted)} idle ones taken over" if plan.adopted else "",
        f"{sent} submitted now, the others as limits allow" if sent < workers else "",
        f"attempt {number}" if number > 1 else "",
        f"not on {', '.join(plan.excluded_nodes)}" if plan.excluded_nodes else "",
    )
    return "; ".join(filter(None, lines))
