"""The arrays of an attempt: as many tasks at a time as the cluster's limits leave room for."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fedllm.planning.workers import next_arrays
from fedllm.rounds.run import Run
from fedllm.rounds.submissions import all_sent, submit
from fedllm.scheduling.seam import Capacity
from fedllm.storage.paths import MOST_ENTRIES, AttemptPaths
from fedllm.storage.records import ArrayRecord, SubmissionRecord

# each leaves a log in the array's folder, beside its sbatch file
_MOST_TASKS = MOST_ENTRIES - 1


def send_waves(run: Run, attempt: AttemptPaths, logs: Path) -> bool:
    """Submit what an attempt still misses of its workers, as far as there is room now.

    Returns:
        Whether all are submitted that there are bundles for.
    """
    if not all_sent(run, attempt, logs):
        return False
    plan = run.read(SubmissionRecord, attempt.submission)
    if not any(_left(plan).values()):
        return True
    # each look costs questions to the scheduler and a listing of claims
    if not run.watch.is_due(("wave", attempt.root), run.config.scheduler.query_seconds):
        return False
    if not _unclaimed(plan, attempt):
        return True
    arrays = next_wave(run, plan)
    if arrays:
        more = plan.model_copy(update={"arrays": [*plan.arrays, *arrays]})
        submit(run, attempt, more, logs)
        run.say(f"{plan.token}: {sum(a.tasks for a in arrays)} more workers")
    return not any(_left(run.read(SubmissionRecord, attempt.submission)).values())


def next_wave(
    run: Run, plan: SubmissionRecord, capacities: Mapping[str, Capacity] | None = None
) -> list[ArrayRecord]:
    """Return the arrays to submit next, one for each class that has workers left to submit."""
    if capacities is None:
        left = [name for name, count in _left(plan).items() if count]
        capacities = {name: run.scheduler.capacity(plan.workers[name].options) for name in left}
    return arrays_within(plan, capacities)


def arrays_within(plan: SubmissionRecord, capacities: Mapping[str, Capacity]) -> list[ArrayRecord]:
    """Return the arrays that there is room for, one for each class that misses workers."""
    left = {name: count for name, count in _left(plan).items() if count}
    free = [capacities[name].free_tasks for name in left]
    limits = [count for count in free if count is not None]
    counts = next_arrays(
        left,
        largest={name: min(capacities[name].largest_array, _MOST_TASKS) for name in left},
        free_tasks=min(limits) if limits else None,
    )
    return [_array(plan, name, tasks) for name, tasks in counts.items()]


def _array(plan: SubmissionRecord, worker_class: str, tasks: int) -> ArrayRecord:
    workers = plan.workers[worker_class]
    number = sum(array.worker_class == worker_class for array in plan.arrays)
    name = f"{plan.token}-{worker_class}-{number}"
    many = sum(w.tasks for w in plan.workers.values()) > MOST_ENTRIES // 2
    # `%N` is per array: the arrays of a class share what may run at once
    share = -(-workers.parallel * tasks // max(1, workers.tasks))
    return ArrayRecord(
        name=name,
        worker_class=worker_class,
        tasks=tasks,
        options=workers.options,
        minutes=workers.minutes,
        parallel=max(1, min(tasks, share)),
        logs=name.removeprefix(f"{plan.token}-") if many else "",
    )


def _left(plan: SubmissionRecord) -> dict[str, int]:
    """Return class -> workers that no array has yet."""
    sent = Counter[str]()
    for array in plan.arrays:
        sent[array.worker_class] += array.tasks
    return {name: max(0, w.tasks - sent[name]) for name, w in plan.workers.items()}


def _unclaimed(plan: SubmissionRecord, attempt: AttemptPaths) -> bool:
    """Say whether a class that misses workers has bundles that nobody took."""
    classes = {name for name, count in _left(plan).items() if count}
    taken = {int(path.stem) for path in attempt.claim_files()}
    return any(b.worker_class in classes and b.number not in taken for b in plan.bundles)
