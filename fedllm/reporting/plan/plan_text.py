"""The plan as text for people."""

from collections.abc import Iterator

from fedllm.errors import counted
from fedllm.planning.option_spelling import by_flag
from fedllm.reporting.plan.plan import Geometry, QueueLimits
from fedllm.reporting.tables import number, size, text_table
from fedllm.reporting.usage import Options
from fedllm.storage.kept_records import duration


def describe_plan(plan: Geometry) -> str:
    """Return the plan as text."""
    return "\n".join(
        [
            *_costs(plan),
            "",
            _arrays(plan),
            _memory(plan),
            _jobs(plan),
            *_submissions(plan),
            _times(plan),
            "",
            _files(plan),
            "",
            _directions(plan),
        ]
    )


def _submissions(plan: Geometry) -> Iterator[str]:
    """Yield what goes to Slurm; nothing where no job does."""
    if not any(array.options for array in plan.arrays):
        return
    yield "sbatch options as submitted"
    yield from (f"  {a.worker_class}: {flags_text(a.options)}" for a in plan.arrays)
    yield from (f"  {job.kind}: {flags_text(job.options)}" for job in plan.jobs)
    yield ""
    yield queue_line(plan)
    yield f"job starts: {plan.job_starts_per_minute:.1f} a minute"
    yield ""


def _arrays(plan: Geometry) -> str:
    rows = [
        [
            array.worker_class,
            ",".join(array.tiers),
            str(array.clients),
            str(array.bundles),
            str(array.tasks),
            str(array.parallel),
            str(array.arrays),
            f"{array.work_minutes:.1f} min",
            "-" if array.requested_minutes is None else f"{array.requested_minutes:.0f} min",
            array.memory or "-",
            str(array.nodes),
            str(array.processes),
            str(array.cpus),
            str(array.gpus),
        ]
        for array in plan.arrays
    ]
    header = ["class", "tiers", "clients", "bundles", "array tasks", "at once", "arrays"]
    header += ["work each", "time limit", "memory", "nodes", "processes", "CPUs", "GPUs"]
    return text_table("client arrays of a round", header, rows) + "\n"


def _memory(plan: Geometry) -> str:
    rows = [
        [
            part.tier,
            part.engine,
            "-" if part.stage is None else f"{part.stage}{' *' if part.chosen else ''}",
            str(part.nodes),
            str(part.processes),
            *map(size, (part.weights, part.adapter, part.gradients, part.optimizer, part.total)),
            "-" if part.memory_gib is None else f"{part.memory_gib:g} GiB",
            "-" if part.peak is None else size(part.peak),
        ]
        for part in plan.memory
    ]
    header = ["tier", "engine", "stage", "nodes", "processes", "weights", "adapter", "gradients"]
    header += ["optimizer", "in all", "memory_gib", "predicted peak"]
    title = "what a process of each tier needs at least, without activations"
    if any(part.stage is not None for part in plan.memory):
        title += " (* the configured stage)"
    return text_table(title, header, rows) + "\n"


def _jobs(plan: Geometry) -> str:
    rows = [
        [
            job.kind,
            str(job.times),
            _time_limit(job.options),
            job.memory or "-",
            str(job.cpus),
            str(job.gpus),
        ]
        for job in plan.jobs
    ]
    header = ["job of one task", "per run", "time limit", "memory", "CPUs", "GPUs"]
    return text_table("other jobs", header, rows) + "\n"


def _time_limit(options: Options) -> str:
    limit = str(options.get("time", "-"))
    return f"{limit} min" if limit.isdigit() else limit


def flags_text(options: Options) -> str:
    """Return options as given to sbatch."""
    return " ".join(_flags(options)) or "(none)"


def _flags(options: Options) -> Iterator[str]:
    for name, value in by_flag(options).items():
        flag = f"--{name}"
        if value is True:
            yield flag
        elif value is not None and value is not False:
            yield f"{flag}={value}"


def queue_line(plan: Geometry) -> str:
    """Return one line with the limits of the queue and what they mean for the arrays."""
    arrays = sum(array.arrays for array in plan.arrays)
    if sum(plan.waves) < plan.tasks:
        return f"{_limits(plan.room)}: no room for any of {counted(plan.tasks, 'task')} now"
    if len(plan.waves) > 1:
        sent = f"{plan.tasks} tasks go out in {len(plan.waves)} waves of up to {max(plan.waves)}"
    else:
        go = "task goes" if plan.tasks == 1 else "tasks go"
        sent = f"{plan.tasks} {go} out at once, in {counted(arrays, 'array')}"
    return f"{_limits(plan.room)}: {sent}"


def _limits(limits: QueueLimits) -> str:
    if limits.problem:
        return f"limits unknown ({limits.problem})"
    parts = []
    if limits.largest_array is not None:
        parts.append(f"MaxArraySize {limits.largest_array}")
    if limits.most_submitted is not None:
        parts.append(f"MaxSubmitJobs {limits.most_submitted}")
        if limits.free_tasks is not None and limits.free_tasks != limits.most_submitted:
            parts[-1] += f" (room for {counted(limits.free_tasks, 'task')} now)"
    elif limits.free_tasks is not None:
        parts.append(f"MaxSubmitJobs leaves room for {counted(limits.free_tasks, 'task')} now")
    else:
        parts.append("no limit on submitted jobs")
    return ", ".join(parts)


def _costs(plan: Geometry) -> Iterator[str]:
    yield (
        f"{counted(plan.rounds, 'round')}; each draws {plan.cohort} of "
        f"{counted(plan.trainable_clients, 'client')} and trains about {plan.tokens:,.0f} tokens"
    )
    yield (
        f"a round trains for about {duration(60 * plan.round_minutes)}, of which workers start for "
        f"{duration(60 * plan.startup_minutes)}; sizes of model and data give this estimate, and "
        "each round corrects it for the next"
    )
    yield _hours("a round", plan, 1)
    yield _hours(counted(plan.rounds, "round"), plan, plan.rounds)
    scored = plan.evaluation
    if scored.times:
        yield (
            f"{counted(scored.times, 'evaluation')}; those of the base and of the last round score "
            f"{counted(scored.rows, 'row')} of {counted(scored.clients, 'client')}, at each "
            "client's own rank and at the largest: up to "
            f"{scored.most_new_tokens:,} generated tokens, at least {duration(scored.seconds)} in "
            f"{counted(scored.tasks, 'task')}"
        )


def _hours(what: str, plan: Geometry, times: int) -> str:
    gpu = f", {number(times * plan.gpu_hours, 2)} GPU hours" if plan.gpu_hours else ""
    return (
        f"{what}: {number(times * plan.worker_hours, 2)} worker hours, "
        f"{number(times * plan.cpu_hours, 2)} CPU hours{gpu} of training"
    )


def _times(plan: Geometry) -> str:
    rows = [[str(t.slots), str(t.tasks), duration(60 * t.minutes)] for t in plan.times]
    header = ["free slots", "array tasks", "training"]
    return text_table("time of a round by free slots", header, rows)


def _files(plan: Geometry) -> str:
    rows = [[f.folder, str(f.files), str(f.largest_folder), size(f.bytes)] for f in plan.folders]
    rows.append(["all", str(plan.files), "", size(plan.bytes)])
    header = ["folder", "files", "largest folder", "bytes"]
    title = f"what a round writes (updates: {size(plan.update_bytes)} of tensors)"
    notes = [f"{f.folder}: {f.note}" for f in plan.folders if f.note]
    return "\n".join([text_table(title, header, rows), *notes])


def _directions(plan: Geometry) -> str:
    rows = [
        [",".join(part.modules), f"{part.first}-{part.last}", number(part.share)]
        for part in plan.directions
    ]
    header = ["modules", "directions", "clients"]
    return text_table(
        "share of the clients that train each direction, by tier shares", header, rows
    )
