"""Plan of a run for `fedllm plan`: what it would submit, cost and write."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedllm.config.models import Config, SbatchOptions
from fedllm.errors import ConfigError, UserError
from fedllm.planning.capacity import Capacity, TaskSize
from fedllm.reporting.plan.plan import Geometry, QueueLimits, RealOptions, plan_geometry
from fedllm.reporting.usage import Options
from fedllm.rounds.dispatch.dry_run import DryRun, dry_run_jobs, plan_first_round
from fedllm.scheduling.seam import Job, Scheduler, SchedulerUnreachable
from fedllm.scheduling.slurm.coordinator_job import coordinator_flags
from fedllm.storage.paths import MAX_ENTRIES, RunPaths, shipped
from fedllm.storage.records import PreparedRecord

# options that identify a job, not its resources
_IDENTITY = {"array", "job-name", "output", "comment"}
_OPTION = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")


@dataclass(frozen=True, kw_only=True)
class JobScript:
    """A job that would be submitted, and its script for the batch system."""

    job: Job
    text: str


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run.

    Attributes:
        geometry: what the run would submit, cost and write.
        scripts: the jobs of its first round; empty without a batch system.
    """

    geometry: Geometry
    scripts: tuple[JobScript, ...]


def plan_run(
    config: Config,
    prepared: PreparedRecord,
    run: RunPaths,
    scheduler: Scheduler,
    *,
    slots: int | None = None,
) -> RunPlan:
    """Plan a run in the directory `run`; nothing is submitted or written.

    Args:
        config: configuration of the run.
        prepared: record of its preparation.
        run: paths of its run directory, which need not exist.
        scheduler: knows how much room there is.
        slots: number of free slots to plan for, instead of asking the scheduler.

    Raises:
        ConfigError: configuration, data and base model do not fit together, or the scheduler
            refuses an option.
    """

    def capacity(options: SbatchOptions, size: TaskSize) -> Capacity:
        room = _capacity(scheduler, options, size, config.scheduler.max_parallel)
        if slots is None:
            return room
        return dataclasses.replace(room, free_slots=slots, max_parallel=slots)

    dry_run = plan_first_round(config, prepared, run, capacity)
    scripts = tuple(_scripts(scheduler, dry_run, run))
    geometry = _geometry(config, dry_run, scripts, _room(scheduler, dry_run))
    return RunPlan(geometry=geometry, scripts=scripts)


def _capacity(
    scheduler: Scheduler, options: SbatchOptions, size: TaskSize, max_parallel: int
) -> Capacity:
    """Return the scheduler's capacity, or a guess where no scheduler answers, as on a laptop."""
    try:
        return scheduler.capacity(options, size)
    except ConfigError:
        raise
    except (UserError, SchedulerUnreachable):
        return Capacity(
            free_slots=max_parallel, max_parallel=max_parallel, largest_array=MAX_ENTRIES
        )


def _geometry(
    config: Config, dry_run: DryRun, scripts: Sequence[JobScript], room: QueueLimits
) -> Geometry:
    slots = max(room.max_parallel for room in dry_run.capacities.values())
    return plan_geometry(
        dry_run.federation,
        dry_run.cohort,
        dry_run.classes,
        dry_run.plan,
        capacities=dry_run.capacities,
        waves=dry_run.waves,
        logs=dry_run.logs,
        scorers=dry_run.scorers,
        slots=sorted({max(1, slots // 4), max(1, slots // 2), slots, 2 * slots, 4 * slots}),
        room=room,
        options=_real_options(config, scripts) if scripts else RealOptions(),
    )


def _scripts(scheduler: Scheduler, dry_run: DryRun, run: RunPaths) -> Iterator[JobScript]:
    """Yield the scripts for the batch system; none without a batch system."""
    for job in dry_run_jobs(dry_run, run):
        text = scheduler.script(job)
        if text is not None:
            yield JobScript(job=job, text=text)


def _real_options(config: Config, scripts: Sequence[JobScript]) -> RealOptions:
    """Return the options in the scripts, with defaults; for a class, those of its first array."""
    classes: dict[str, Options] = {}
    jobs: dict[str, Options] = {}
    for script in scripts:
        job, options = script.job, _options(script.text)
        if job.worker_class is None:
            jobs[job.program] = options
        else:
            classes.setdefault(job.worker_class, options)
    section = config.scheduler
    name = "chain" if section.coordinator == "chained" else "coordinator"
    text = shipped(f"slurm/{name}.sbatch").read_text(encoding="utf-8")
    jobs["coordinator"] = {**_options(text), **coordinator_flags(section)}
    return RealOptions(classes=classes, jobs=jobs)


def _options(text: str) -> Options:
    matches = (_OPTION.fullmatch(line) for line in text.splitlines())
    return {
        match[1]: True if match[2] is None else match[2].strip("'\"")
        for match in matches
        if match and match[1] not in _IDENTITY
    }


def _room(scheduler: Scheduler, dry_run: DryRun) -> QueueLimits:
    """Return the scheduler's limits, the smallest of those of all classes."""
    limits_of_classes = [
        scheduler.limits(workers.options) for workers in dry_run.plan.workers.values()
    ]
    known = [limits for limits in limits_of_classes if not limits.problem]
    if not known:
        return QueueLimits(problem=next((limits.problem for limits in limits_of_classes), ""))
    sizes = [limits.largest_array for limits in known]
    queued = [limits.max_submitted for limits in known]
    free = [room.free_tasks for room in dry_run.capacities.values()]
    return QueueLimits(
        largest_array=_min(sizes), most_submitted=_min(queued), free_tasks=_min(free)
    )


def _min(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
