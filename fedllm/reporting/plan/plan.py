"""The geometry of a round: its jobs, time and files, before anything is submitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.config.models import Config
from fedllm.planning.capacity import Capacity
from fedllm.planning.classes import JobKind
from fedllm.planning.engines import engines_of, job_size
from fedllm.planning.evaluation_targets import is_evaluated, last_pieces, shared_seconds
from fedllm.planning.federation import Federation
from fedllm.planning.workers import ClassPlan
from fedllm.reporting.plan.plan_directions import DirectionsPlan, plan_directions
from fedllm.reporting.plan.plan_files import FolderPlan, folders_of_round
from fedllm.reporting.plan.plan_memory import MemoryPlan, plan_memory
from fedllm.reporting.plan.plan_time import (
    SlotsPlan,
    round_seconds,
    startup_seconds,
    times_for_slots,
)
from fedllm.reporting.results.summary import update_bytes
from fedllm.reporting.usage import Options, cpus_of, gpus_of, memory_of, of_task
from fedllm.storage.records import CohortClient, SubmissionRecord


@dataclass(frozen=True, kw_only=True)
class ArrayPlan:
    """The workers of a class, `tasks` in all in `arrays`, `parallel` at once, and their options."""

    worker_class: str
    tiers: tuple[str, ...]
    clients: int
    bundles: int
    tasks: int
    parallel: int
    arrays: int
    work_minutes: float
    requested_minutes: float | None
    nodes: int
    processes: int
    cpus: int
    gpus: int
    memory: str
    options: Options


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """A job of one task, and how often a run submits it."""

    kind: str
    times: int
    cpus: int
    gpus: int
    memory: str
    options: Options


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """The evaluations of a run; each row is scored at its client's rank and at the largest rank.

    `tasks` share the largest evaluation, and `seconds` is the time until the last of them ends,
    estimated from operations alone: generating text is slower.
    """

    times: int
    clients: int
    rows: int
    most_new_tokens: int
    tasks: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """Limits of the queue; None means unknown."""

    largest_array: int | None = None
    free_tasks: int | None = None
    most_submitted: int | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The jobs and files of a run; the round described is round 1, with its cohort."""

    rounds: int
    trainable_clients: int
    cohort: int
    tokens: float
    arrays: tuple[ArrayPlan, ...]
    jobs: tuple[JobPlan, ...]
    waves: tuple[int, ...]
    room: QueueLimits
    tasks: int
    bundles: int
    round_minutes: float
    job_starts_per_minute: float
    startup_minutes: float
    worker_hours: float
    cpu_hours: float
    gpu_hours: float
    times: tuple[SlotsPlan, ...]
    update_bytes: int
    bytes: int
    files: int
    folders: tuple[FolderPlan, ...]
    evaluation: EvaluationPlan
    directions: tuple[DirectionsPlan, ...]
    memory: tuple[MemoryPlan, ...]


@dataclass(frozen=True, kw_only=True)
class RealOptions:
    """All sbatch options as submitted, per class of workers and per job of one task."""

    classes: Mapping[str, Options] = field(default_factory=dict)
    jobs: Mapping[str, Options] = field(default_factory=dict)


def plan_geometry(
    federation: Federation,
    cohort: Sequence[CohortClient],
    classes: Sequence[ClassPlan],
    plan: SubmissionRecord,
    *,
    capacities: Mapping[str, Capacity],
    waves: tuple[int, ...],
    logs: Sequence[Path],
    scorers: int,
    slots: Sequence[int],
    room: QueueLimits,
    options: RealOptions,
) -> Geometry:
    """Return the jobs and files of a run.

    Args:
        federation: clients, tiers and classes.
        cohort: the clients that train in the round.
        classes: workers and bundles per class.
        plan: the plan with all its arrays.
        capacities: class -> the free capacity for it.
        waves: the number of tasks submitted together, wave by wave.
        logs: the logs that the arrays write.
        scorers: tasks that share the last evaluation.
        slots: numbers of free slots to estimate the time for.
        room: the limits of the queue.
        options: the options as sbatch gets them; empty if nothing goes to Slurm.
    """
    config, prepared = federation.config, federation.prepared
    arrays = tuple(_array(federation, item, plan, options) for item in classes)
    startup = startup_seconds(capacities)
    seconds = round_seconds(classes, startup=startup, one_bundle=plan.one_bundle)
    hours = [_worker_hours(item, startup, plan.one_bundle) for item in classes]
    folders = folders_of_round(federation, cohort, plan, logs)
    tasks = sum(item.workers for item in classes)
    evaluation = _evaluation(federation, scorers)
    # a round also starts an aggregation and its share of the evaluations
    starts = tasks + 1 + evaluation.times * evaluation.tasks / config.rounds
    return Geometry(
        rounds=config.rounds,
        trainable_clients=len(federation.trainable),
        cohort=len(cohort),
        tokens=sum(client.cost for client in cohort),
        arrays=arrays,
        jobs=_jobs(config, evaluation, options),
        waves=waves,
        room=room,
        tasks=tasks,
        bundles=len(plan.bundles),
        round_minutes=seconds / 60,
        job_starts_per_minute=60 * starts / seconds if seconds else 0.0,
        startup_minutes=startup / 60,
        worker_hours=sum(hours),
        cpu_hours=sum(time * array.cpus for time, array in zip(hours, arrays, strict=True)),
        gpu_hours=sum(time * array.gpus for time, array in zip(hours, arrays, strict=True)),
        times=times_for_slots(
            federation, cohort, capacities, {c.worker_class: c.options for c in classes}, slots
        ),
        update_bytes=sum(
            update_bytes(federation.ranks[client.tier], prepared.modules, prepared.sent)
            for client in cohort
        ),
        bytes=sum(folder.bytes for folder in folders),
        files=sum(folder.files for folder in folders),
        folders=folders,
        evaluation=evaluation,
        directions=plan_directions(federation),
        memory=plan_memory(federation),
    )


def _array(
    federation: Federation, class_plan: ClassPlan, plan: SubmissionRecord, real: RealOptions
) -> ArrayPlan:
    name = class_plan.worker_class
    options, size = real.classes.get(name, {}), federation.engines[name].size
    task = of_task(class_plan.options, size.processes, size.nodes)
    return ArrayPlan(
        worker_class=name,
        tiers=tuple(tier for tier, class_ in federation.classes.items() if class_ == name),
        clients=sum(len(bundle.clients) for bundle in class_plan.bundles),
        bundles=len(class_plan.bundles),
        tasks=class_plan.workers,
        parallel=class_plan.parallel,
        arrays=sum(array.worker_class == name for array in plan.arrays),
        work_minutes=class_plan.seconds / class_plan.workers / 60,
        requested_minutes=class_plan.minutes,
        nodes=size.nodes,
        processes=size.processes,
        cpus=cpus_of(task),
        gpus=gpus_of(task),
        memory=memory_of(class_plan.options),
        options=options,
    )


def _worker_hours(class_plan: ClassPlan, startup: float, one_bundle: bool) -> float:
    # a worker that waits for a slot finds little work when it starts, so it hardly counts
    starts = len(class_plan.bundles) if one_bundle else min(class_plan.workers, class_plan.parallel)
    return (class_plan.seconds + starts * startup) / 3600


def _jobs(config: Config, evaluation: EvaluationPlan, real: RealOptions) -> tuple[JobPlan, ...]:
    times = {"prepare": 1, "coordinator": 1, "aggregate": config.rounds + 1}
    times["evaluate"] = evaluation.times
    jobs = []
    kinds: tuple[JobKind, ...] = ("prepare", "coordinator", "aggregate", "evaluate")
    for kind in kinds:
        options = real.jobs.get(kind, {})
        size = job_size(kind, engines_of(config))
        task = of_task(options, size.processes, size.nodes)
        jobs.append(
            JobPlan(
                kind=kind,
                times=times[kind],
                cpus=cpus_of(task),
                gpus=gpus_of(task),
                memory=memory_of(options),
                options=options,
            )
        )
    return tuple(jobs)


def _evaluation(federation: Federation, tasks: int) -> EvaluationPlan:
    """Return the cost of evaluations; the largest are those of the base and of the last round."""
    config, pieces = federation.config, last_pieces(federation)
    section, rows = config.evaluation, sum(piece.rows for piece in pieces)
    return EvaluationPlan(
        times=sum(is_evaluated(section, n, config.rounds) for n in range(config.rounds + 1)),
        clients=sum(len(piece.targets) for piece in pieces),
        rows=rows,
        most_new_tokens=2 * rows * section.max_new_tokens,
        tasks=tasks,
        seconds=shared_seconds(federation, pieces, tasks),
    )
