"""The command that says what a configuration would submit, and submits nothing."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    configuration,
    fresh_folder,
    say,
    say_json,
)
from fedllm.config.models import Config, SbatchOptions
from fedllm.errors import ConfigError, UserError
from fedllm.planning.capacity import Capacity
from fedllm.reporting.plan import Geometry, RealOptions, Room, plan_geometry
from fedllm.reporting.plan_text import describe_plan
from fedllm.reporting.usage import Options
from fedllm.rounds.rehearsal import Rehearsal, rehearse, rehearsed_jobs
from fedllm.scheduling.logs import script_of
from fedllm.scheduling.seam import Job, Scheduler, SchedulerUnreachable
from fedllm.scheduling.slurm_coordinator import coordinator_flags
from fedllm.scheduling.slurm_options import refuse_owned
from fedllm.storage.paths import MOST_ENTRIES, RunPaths, cache_of, shipped
from fedllm.storage.publish import publish_bytes

# what identifies a job is not what it asks for
_IDENTITY = {"array", "job-name", "output", "comment"}
_OPTION = re.compile(r"#SBATCH --([a-z-]+)(?:=(.*))?")


@dataclass(frozen=True, kw_only=True)
class _Script:
    """A job that would be submitted, and what a batch system would be given for it."""

    job: Job
    text: str


def plan(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the sbatch files here.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", metavar="N", min=1, help="Plan for N free slots."),
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Print what a round submits, costs and writes, and how long it takes; submit nothing."""
    from fedllm.steps.prepare import prepare as prepare_step

    loaded = configuration(config, set_ or [])
    refuse_owned(loaded.scheduler)
    if out is not None:
        fresh_folder(out)
    root = execution.default_run_dir(config)
    prepared = prepare_step(loaded, cache_of(loaded.storage.cache, root))
    run = RunPaths(root=root.resolve())
    scheduler = execution.make_scheduler(run, loaded)

    def capacity(options: SbatchOptions) -> Capacity:
        room = _capacity(scheduler, options, loaded.scheduler.max_parallel)
        if slots is None:
            return room
        return dataclasses.replace(room, free_slots=slots, most_parallel=slots)

    try:
        rehearsal = rehearse(loaded, prepared, run, capacity)
        scripts = list(_scripts(scheduler, rehearsal, run))
        geometry = _geometry(loaded, rehearsal, scripts, _room(scheduler, rehearsal))
    finally:
        scheduler.close()
    if json_:
        say_json(dataclasses.asdict(geometry))
    else:
        say(describe_plan(geometry))
    if out is None:
        return
    for script in scripts:
        file = script_of(out, script.job.name)
        publish_bytes(file, script.text.encode())
        if not json_:
            say(f"wrote {file}")


def _capacity(scheduler: Scheduler, options: SbatchOptions, most: int) -> Capacity:
    """Return what there is room for; a plan is made on a laptop, too."""
    try:
        return scheduler.capacity(options)
    except ConfigError:
        raise
    except (UserError, SchedulerUnreachable):
        return Capacity(free_slots=most, most_parallel=most, largest_array=MOST_ENTRIES)


def _geometry(
    config: Config, rehearsal: Rehearsal, scripts: Sequence[_Script], room: Room
) -> Geometry:
    most = max(room.most_parallel for room in rehearsal.capacities.values())
    return plan_geometry(
        rehearsal.federation,
        rehearsal.cohort,
        rehearsal.classes,
        rehearsal.plan,
        capacities=rehearsal.capacities,
        waves=rehearsal.waves,
        logs=rehearsal.logs,
        slots=sorted({max(1, most // 4), max(1, most // 2), most, 2 * most, 4 * most}),
        room=room,
        options=_real_options(config, scripts) if scripts else RealOptions(),
    )


def _scripts(scheduler: Scheduler, rehearsal: Rehearsal, run: RunPaths) -> Iterator[_Script]:
    """Yield what a batch system would be given; nothing where none is used."""
    for job in rehearsed_jobs(rehearsal, run):
        text = scheduler.script(job)
        if text is not None:
            yield _Script(job=job, text=text)


def _real_options(config: Config, scripts: Sequence[_Script]) -> RealOptions:
    """Return the options that stand in the scripts, defaults too; of a class, the first's."""
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
    found = (_OPTION.fullmatch(line) for line in text.splitlines())
    return {
        match[1]: True if match[2] is None else match[2].strip("'\"")
        for match in found
        if match and match[1] not in _IDENTITY
    }


def _room(scheduler: Scheduler, rehearsal: Rehearsal) -> Room:
    """Return what the scheduler says of its limits, those that leave the least."""
    said = [scheduler.limits(workers.options) for workers in rehearsal.plan.workers.values()]
    known = [limits for limits in said if not limits.problem]
    if not known:
        return Room(problem=next((limits.problem for limits in said), ""))
    sizes = [limits.largest_array for limits in known]
    queued = [limits.most_submitted for limits in known]
    free = [room.free_tasks for room in rehearsal.capacities.values()]
    return Room(largest_array=_least(sizes), most_submitted=_least(queued), free_tasks=_least(free))


def _least(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
