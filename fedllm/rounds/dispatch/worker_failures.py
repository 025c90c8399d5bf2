"""Worker failures: silent workers, broken nodes, too little memory, no progress."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedllm.config.models import SbatchOptions
from fedllm.errors import Incomplete, OutOfMemory, ProcessLost, counted
from fedllm.planning.classes import asks_for_gpus, with_more_memory
from fedllm.rounds.dispatch.cancelling import end_tasks
from fedllm.rounds.dispatch.idle_workers import all_tasks
from fedllm.rounds.dispatch.submissions import (
    is_since_start,
    known_tasks,
    record_outcome,
    was_preempted,
)
from fedllm.rounds.dispatch.waves import has_unclaimed_bundles
from fedllm.rounds.run import Run
from fedllm.scheduling.endings import exit_status, reason_of
from fedllm.scheduling.seam import Ending, EndReason, TaskState
from fedllm.storage.checkpoint_header import steps_of_checkpoint
from fedllm.storage.paths import AttemptPaths, RoundPaths, attempts_of
from fedllm.storage.records import (
    ClaimRecord,
    ErrorRecord,
    JobsRecord,
    OutcomeRecord,
    SubmissionRecord,
    TaskRecord,
    training_text,
)
from fedllm.storage.updates import Scan

# a node may cause these; it does not cause timeouts, out-of-memory or preemption
_NODE_FAULTS = {EndReason.FAILED, EndReason.NODE_LOST}
_MEMORY_GROWTH = 1.5
_MAX_ERRORS = 3


def cancel_silent_workers(run: Run, attempt: AttemptPaths) -> None:
    """Cancel running tasks whose heartbeat has not changed for `scheduler.hung_minutes`.

    Time is measured on this coordinator's own clock. While a task is suspended it stands still,
    and begins anew when the task goes on. Workers that were taken over are watched
    too; idle workers are not, as they write no heartbeat.

    Raises:
        SchedulerUnreachable: a task could not be cancelled; the next call tries again.
    """
    hung_seconds = 60.0 * run.config.scheduler.hung_minutes
    if not run.observations.is_due(("silent", attempt.root), min(60.0, hung_seconds / 4)):
        return
    ids = all_tasks(run, attempt)
    states = run.scheduler.states(ids) if ids else {}
    for task in (task for task, state in states.items() if state is TaskState.SUSPENDED):
        run.observations.restart_silence(task)
    running = [task for task, state in states.items() if state is TaskState.RUNNING]
    for task in [task for task in running if task not in run.observations.cancelled]:
        path = attempt.task(task)
        silent_seconds = run.observations.silent_seconds(task, _modified_ns(path))
        record = TaskRecord.glance(path) if silent_seconds >= hung_seconds else None
        if silent_seconds < hung_seconds or (record and record.state == "lingering"):
            continue
        doing = "no client started"
        if record and record.client:
            doing = f"client {training_text(record.client, record.clients)}, step {record.step}"
        why = f"no progress for {silent_seconds / 60:.1f} minutes ({doing})"
        if end_tasks(run, [task]):
            run.observations.cancelled[task] = why
            run.say(f"{task}: {why}; cancelled, its clients train elsewhere")


def cancel_queued_tasks(run: Run, attempt: AttemptPaths) -> None:
    """Cancel tasks that wait in the queue once other tasks claimed every bundle.

    They would find nothing to do, and until then count against the limits. A requeued task that
    holds bundles stays.
    """
    if not run.observations.is_due(("queued", attempt.root), run.config.scheduler.query_seconds):
        return
    waiting, _ = waiting_and_running(run, attempt)
    if not waiting:
        return
    holders = run.observations.holders.get(attempt.root)
    if holders is None:
        plan = run.known_records.read(SubmissionRecord, attempt.submission)
        if has_unclaimed_bundles(run, attempt, {bundle.worker_class for bundle in plan.bundles}):
            return
        # every bundle is claimed, so the claims are read only once
        holders = {ClaimRecord.read(path).task for path in attempt.claim_files()}
        run.observations.holders[attempt.root] = holders
    if idle := [task for task in waiting if task not in holders]:
        end_tasks(run, idle, only_waiting=True)


def waiting_and_running(run: Run, attempt: AttemptPaths) -> tuple[list[str], list[str]]:
    """Return the tasks of an attempt that wait in the queue, and those that may run."""
    ids = known_tasks(run, attempt)
    states = run.scheduler.states(ids) if ids else {}
    waiting = [task for task, state in states.items() if state is TaskState.WAITING]
    running = [
        task for task, state in states.items() if state not in {TaskState.WAITING, TaskState.GONE}
    ]
    return waiting, running


def close_attempt(run: Run, attempt: AttemptPaths) -> OutcomeRecord:
    """Record once how an attempt ended, and whether its unfinished clients made progress."""
    known = run.known_records.find(OutcomeRecord, attempt.outcome)
    if known:
        return known
    paths = attempt.round
    before = (
        record_outcome(run, paths.attempt(attempt.number - 1)).checkpoints
        if attempt.number > 1
        else {}
    )
    now = {path.name: steps_of_checkpoint(path) for path in paths.checkpoint_files()}
    outcome = record_outcome(
        run,
        attempt,
        # a checkpoint that was written again, of no later step, is no progress
        checkpoints={name: max(steps, before.get(name, 0)) for name, steps in now.items()},
        progressed=any(steps > before.get(name, 0) for name, steps in now.items()),
    )
    for line in _describe_endings(attempt, outcome):
        run.say(line)
    return outcome


def _describe_endings(attempt: AttemptPaths, outcome: OutcomeRecord) -> Iterator[str]:
    endings = Counter((e.state, e.node) for e in outcome.endings.values())
    for (state, node), count in sorted(endings.items()):
        place = f" on {node}" if node else ""
        yield (
            f"round {attempt.round.number}, attempt {attempt.number}: {count} "
            f"task{'s' if count > 1 else ''} ended {state}{place}"
        )
    # the first of several processes that was lost is in its task's record alone
    errors = [ErrorRecord.read(path) for path in attempt.task_errors()[:_MAX_ERRORS]]
    yield from (
        f"round {attempt.round.number}, attempt {attempt.number}: {error.message}; log {error.log}"
        for error in errors
        if error.kind == ProcessLost.__name__
    )


def count_fruitless_attempts(run: Run, attempt: AttemptPaths, scan: Scan) -> int:
    """Return the number of latest attempts in a row without a new update or checkpoint.

    Attempts that ended by preemption do not count. Nor do attempts from before a person last
    started the run.
    """
    fruitful = {update.record.attempt for update in scan.published.values()}
    count = 0
    for number in range(attempt.number, 0, -1):
        paths = attempt.round.attempt(number)
        outcome = close_attempt(run, paths)
        if number in fruitful or outcome.progressed or not is_since_start(run, paths):
            break
        count += not was_preempted(outcome)
    return count


def excluded_nodes(run: Run, paths: RoundPaths, attempts: int) -> list[str]:
    """Return the nodes that workers must avoid: those where `scheduler.node_failures` tasks failed.

    A node is excluded only if another node ran something: otherwise the node may not be the cause.
    """
    before: set[str] = set()
    if paths.number > 1:
        for last in attempts_of(paths.previous.attempt)[-1:]:
            before = set(run.known_records.read(SubmissionRecord, last.submission).excluded_nodes)
    max_failures = run.config.scheduler.node_failures
    failures: Counter[str] = Counter()
    ran: set[str] = set()
    for number in range(1, attempts + 1):
        attempt = paths.attempt(number)
        endings = close_attempt(run, attempt).endings.values()
        failures.update(e.node for e in endings if e.node and _is_nodes_fault(e))
        ran |= _nodes(attempt)
    broken = {node for node, count in failures.items() if count >= max_failures}
    if paths.number > 1 and broken:
        ran = ran.union(*map(_nodes, attempts_of(paths.previous.attempt)))
    if not (ran | set(failures)) - broken:
        broken = set()
    for node in sorted(broken - before):
        if run.observations.is_new(("excluded", node)):
            run.say(
                f"node {node}: {counted(failures[node], 'task')} failed there; excluded from now on"
            )
    return sorted(before | broken)


def _is_nodes_fault(ending: Ending) -> bool:
    # Slurm also counts a task as failed that stopped in order, before its time limit or preemption
    in_order = exit_status(ending) == Incomplete.exit_code
    return reason_of(ending) in _NODE_FAULTS and not in_order


def _nodes(attempt: AttemptPaths) -> set[str]:
    """Return the nodes on which workers of an attempt started."""
    records = map(TaskRecord.glance, attempt.task_files())
    return {record.node for record in records if record}


def memory_factor(run: Run, paths: RoundPaths, attempts: int, worker_class: str) -> float:
    """Return the memory factor of a class: requested memory over configured memory, at least 1.

    It grows with every attempt that ran out of memory, and later rounds keep it.
    """
    if not attempts and paths.number == 1:
        return 1.0
    last = paths if attempts else paths.previous
    number = attempts or last.last_attempt()
    if not number:
        return 1.0
    attempt = last.attempt(number)
    plan = run.known_records.find(SubmissionRecord, attempt.submission)
    workers = plan.workers.get(worker_class) if plan else None
    factor = workers.memory_factor if workers else 1.0
    ran_out = attempt.outcome.exists() and _ran_out_of_memory(run, attempt, worker_class)
    return factor * _MEMORY_GROWTH if ran_out else factor


def with_memory(
    run: Run, worker_class: str, options: SbatchOptions, factor: float
) -> SbatchOptions:
    """Return a class's options with `factor` times the memory, and log the change."""
    if factor == 1.0:
        return options
    grown = with_more_memory(options, factor)
    if grown is None:
        run.say(
            f"class {worker_class}: out of memory, and no `mem` to raise; set "
            "scheduler.sbatch.client.mem"
        )
        return options
    changed = [f"{key} {grown[key]}" for key in grown if grown[key] != options.get(key)]
    run.say(f"class {worker_class}: out of memory; asking for {', '.join(changed)}")
    return grown


def _ran_out_of_memory(run: Run, attempt: AttemptPaths, worker_class: str) -> bool:
    endings = close_attempt(run, attempt).endings
    plan = run.known_records.read(SubmissionRecord, attempt.submission)
    jobs = run.known_records.find(JobsRecord, attempt.jobs)
    mine = [a for a in plan.arrays if a.worker_class == worker_class]
    tasks = {task for array in mine if jobs for task in jobs.ids.get(array.name, [])}
    for task in plan.adopted:
        record = run.known_records.glance(TaskRecord, attempt.task(task))
        if record and record.worker_class == worker_class:
            tasks.add(task)
    ended = [reason_of(endings[task]) for task in tasks if task in endings]
    if EndReason.OUT_OF_MEMORY in ended:
        return True
    # with GPUs it was the GPU's memory, which no option of a job enlarges
    if any(asks_for_gpus(array.options) for array in mine):
        return False
    errors = {path: ErrorRecord.read(path) for path in attempt.task_errors()}
    own = {attempt.task_error(task) for task in tasks}
    return any(e.kind == OutOfMemory.__name__ for path, e in errors.items() if path in own)


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
