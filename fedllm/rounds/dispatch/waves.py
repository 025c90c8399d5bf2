"""Waves of arrays: an attempt submits as many tasks at a time as the cluster's limits allow."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedllm.errors import counted
from fedllm.planning.quotas import largest_remainder
from fedllm.planning.workers import next_arrays
from fedllm.rounds.dispatch.submissions import (
    active_tasks,
    known_tasks,
    submit_more,
    submit_unsent,
)
from fedllm.rounds.run import Run
from fedllm.scheduling.log_names import need_folders
from fedllm.storage.paths import AttemptPaths
from fedllm.storage.records import ArrayRecord, JobsRecord, SubmissionRecord


def send_waves(run: Run, attempt: AttemptPaths, logs: Path) -> bool:
    """Submit workers that an attempt still misses, as many as there is room for now.

    Returns:
        Whether every worker is submitted that there are bundles for.
    """
    if not submit_unsent(run, attempt, logs):
        return False
    plan = run.known_records.read(SubmissionRecord, attempt.submission)
    if not any(_left(plan).values()):
        return True
    # this may query the scheduler, so not at every call
    if not run.observations.is_due(("wave", attempt.root), run.config.scheduler.query_seconds):
        return False
    if not has_unclaimed_bundles(
        run, attempt, [name for name, count in _left(plan).items() if count]
    ):
        return True
    arrays = next_wave(run, plan, _alive(run, attempt))
    if arrays:
        more = plan.model_copy(update={"arrays": [*plan.arrays, *arrays]})
        submit_more(run, attempt, more, logs)
        run.say(f"{plan.token}: {counted(sum(a.tasks for a in arrays), 'more worker')}")
    return not any(_left(run.known_records.read(SubmissionRecord, attempt.submission)).values())


def next_wave(
    run: Run, plan: SubmissionRecord, alive: Mapping[str, int] | None = None
) -> list[ArrayRecord]:
    """Return the arrays to submit next; `alive` is array -> number of tasks that did not end."""
    counts = _to_submit(plan, alive or {})
    rooms = {name: run.scheduler.room(plan.workers[name].options) for name in counts}
    return arrays_within(plan, rooms, alive)


def arrays_within(
    plan: SubmissionRecord,
    rooms: Mapping[str, int | None],
    alive: Mapping[str, int] | None = None,
) -> list[ArrayRecord]:
    """Return the arrays that there is room for.

    The first arrays of a class have all its tasks; Slurm's `%N` limits how many run at once. Later
    arrays have as many tasks as may start beside those that are alive.

    Args:
        plan: the attempt's plan, with the arrays that were submitted.
        rooms: class -> number of tasks that may be submitted now; None: any number.
        alive: array -> number of tasks that did not end.
    """
    counts = _to_submit(plan, alive or {})
    sizes = next_arrays(
        counts,
        largest={name: plan.workers[name].largest_array for name in counts},
        rooms=rooms,
    )
    return [array for name, tasks in sizes.items() for array in _arrays(plan, name, tasks)]


def _to_submit(plan: SubmissionRecord, alive: Mapping[str, int]) -> dict[str, int]:
    """Return class -> number of tasks to submit now, if there is room."""
    counts: dict[str, int] = {}
    for name, left in _left(plan).items():
        earlier = [array for array in plan.arrays if array.worker_class == name]
        running = sum(min(a.parallel or a.tasks, alive.get(a.name, 0)) for a in earlier)
        may_start = plan.workers[name].parallel - running if earlier else left
        if min(left, may_start) > 0:
            counts[name] = min(left, may_start)
    return counts


def _arrays(plan: SubmissionRecord, worker_class: str, sizes: list[int]) -> list[ArrayRecord]:
    workers = plan.workers[worker_class]
    first = sum(array.worker_class == worker_class for array in plan.arrays)
    in_folders = need_folders(sum(w.tasks for w in plan.workers.values()))
    # `%N` is per array, so the arrays of a class share their number of parallel tasks
    shares = {str(n): float(size) for n, size in enumerate(sizes)}
    parallel = largest_remainder(shares, min(workers.parallel, sum(sizes)))
    return [
        ArrayRecord(
            name=f"{plan.token}-{worker_class}-{number}",
            worker_class=worker_class,
            tasks=tasks,
            options=workers.options,
            minutes=workers.minutes,
            parallel=max(1, parallel[str(place)]),
            logs=f"{worker_class}-{number}" if in_folders else "",
            processes=workers.processes,
            nodes=workers.nodes,
        )
        for place, (number, tasks) in enumerate(enumerate(sizes, first))
    ]


def _left(plan: SubmissionRecord) -> dict[str, int]:
    """Return class -> number of workers that no array has yet."""
    sent = Counter[str]()
    for array in plan.arrays:
        sent[array.worker_class] += array.tasks
    return {name: max(0, w.tasks - sent[name]) for name, w in plan.workers.items()}


def _alive(run: Run, attempt: AttemptPaths) -> dict[str, int]:
    """Return array -> number of tasks that did not end."""
    jobs = run.known_records.find(JobsRecord, attempt.jobs)
    alive = set(active_tasks(run.scheduler, known_tasks(run, attempt)))
    return {name: len(alive.intersection(ids)) for name, ids in jobs.ids.items()} if jobs else {}


def has_unclaimed_bundles(run: Run, attempt: AttemptPaths, classes: Iterable[str]) -> bool:
    """Return whether bundles of these classes are unclaimed.

    Claims are never removed, so a bundle that was found claimed is not looked at again.
    """
    plan = run.known_records.read(SubmissionRecord, attempt.submission)
    for name in classes:
        unclaimed = run.observations.unclaimed.get((attempt.root, name))
        if unclaimed is None:
            unclaimed = [b.number for b in plan.bundles if b.worker_class == name]
            run.observations.unclaimed[attempt.root, name] = unclaimed
        while unclaimed and attempt.claim(unclaimed[-1]).exists():
            unclaimed.pop()
        if unclaimed:
            return True
    return False
