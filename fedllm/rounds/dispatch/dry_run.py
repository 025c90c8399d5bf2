"""Dry run: what the first round would submit, without submitting or writing anything."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.models import Config, SbatchOptions
from fedllm.planning.capacity import Capacity, TaskSize
from fedllm.planning.classes import tier_options
from fedllm.planning.evaluation_targets import last_pieces, scorers_of
from fedllm.planning.federation import Federation, plan_federation
from fedllm.planning.workers import ClassPlan, plan_classes
from fedllm.rounds.dispatch.attempts import workers_record
from fedllm.rounds.dispatch.submissions import ServerProgram, array_name, job_of, server_array
from fedllm.rounds.dispatch.waves import arrays_within
from fedllm.scheduling.log_names import files_of
from fedllm.scheduling.seam import Job
from fedllm.storage.paths import JobPaths, RunPaths
from fedllm.storage.records import (
    ArrayRecord,
    CohortClient,
    PreparedRecord,
    SubmissionRecord,
)

_RUN_ID = "plan"


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The first round as it would be submitted.

    Attributes:
        federation: clients, tiers and classes.
        cohort: the clients of the first round.
        classes: workers and bundles per class.
        capacities: class -> its capacity.
        plan: the plan with the arrays of all waves.
        waves: number of tasks of each wave.
        logs: the log files that the arrays would write.
        scorers: tasks that share the last evaluation.
    """

    federation: Federation
    cohort: list[CohortClient]
    classes: list[ClassPlan]
    capacities: Mapping[str, Capacity]
    plan: SubmissionRecord
    waves: tuple[int, ...]
    logs: tuple[Path, ...]
    scorers: int


def plan_first_round(
    config: Config,
    prepared: PreparedRecord,
    run: RunPaths,
    capacity: Callable[[SbatchOptions, TaskSize], Capacity],
) -> DryRun:
    """Plan the first round of a run in the directory `run`; nothing is written.

    Raises:
        ConfigError: configuration, data and base model do not fit together.
    """
    federation = plan_federation(config, prepared)
    cohort = federation.cohort(1)
    groups = federation.groups(cohort)
    names = sorted({federation.classes[group.tier] for group in groups})
    options = {name: tier_options(config.scheduler.sbatch, name) for name in names}
    sizes = {name: federation.engines[name].size for name in names}
    capacities = {name: capacity(flags, sizes[name]) for name, flags in options.items()}
    classes = plan_classes(
        groups,
        federation.classes,
        costs=federation.seed_costs(),
        capacities=capacities,
        options=options,
        section=config.scheduler,
    )
    plan = SubmissionRecord(
        token=array_name(_RUN_ID, 1, "train", "a01"),
        lease=0,
        kind="client",
        command=[str(run.round(1).attempt(1).root)],
        arrays=[],
        bundles=[bundle for c in classes for bundle in c.bundles],
        workers={
            c.worker_class: workers_record(c, capacities[c.worker_class], sizes[c.worker_class])
            for c in classes
        },
        one_bundle=config.scheduler.clients_per_task != "auto",
    )
    waves = list(_waves(plan, capacities))
    arrays = [array for wave in waves for array in wave]
    return DryRun(
        federation=federation,
        cohort=cohort,
        classes=classes,
        capacities=capacities,
        plan=plan.model_copy(update={"arrays": arrays}),
        waves=tuple(sum(array.tasks for array in wave) for wave in waves),
        logs=tuple(_logs(arrays, run.logs(1))),
        scorers=scorers_of(federation, last_pieces(federation), capacity),
    )


def _waves(
    plan: SubmissionRecord, capacities: Mapping[str, Capacity]
) -> Iterator[list[ArrayRecord]]:
    """Yield waves: the arrays submitted together once all of the wave before have ended."""
    rooms = {name: capacity.free_tasks for name, capacity in capacities.items()}
    while wave := arrays_within(plan, rooms):
        plan = plan.model_copy(update={"arrays": [*plan.arrays, *wave]})
        yield wave


def _logs(arrays: Sequence[ArrayRecord], folder: Path) -> Iterator[Path]:
    for number, array in enumerate(arrays, 1):
        tasks = [f"{number}_{task}" for task in range(array.tasks)]
        yield from files_of(folder / array.logs, array.name, tasks)


def dry_run_jobs(dry_run: DryRun, run: RunPaths) -> list[Job]:
    """Return the jobs that the first round would submit, with those of prepare."""
    config = dry_run.federation.config
    logs, first = run.logs(1), run.round(1)
    jobs = [job_of(dry_run.plan, array, logs) for array in dry_run.plan.arrays]
    steps: tuple[tuple[ServerProgram, Path, JobPaths, int], ...] = (
        ("prepare", run.root, run.prepare_job(1), 0),
        ("aggregate", first.root, first.aggregate_job(1), 1),
        ("evaluate", first.root, first.evaluation_job(1), 1),
    )
    for kind, root, folder, number in steps:
        token = array_name(_RUN_ID, number, kind, "a01")
        plan = SubmissionRecord(
            token=token,
            lease=0,
            kind=kind,
            command=[str(root), "--job", str(folder.root)],
            arrays=[server_array(config, kind, token)],
        )
        jobs.append(job_of(plan, plan.arrays[0], run.logs(number)))
    return jobs
