"""Idle workers: they stay after a round, and the next one takes them over without queueing."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from fedllm.rounds.dispatch.submissions import is_of_run, known_tasks
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import TaskState
from fedllm.storage.paths import AttemptPaths, RoundPaths, attempts_of
from fedllm.storage.records import SubmissionRecord, TaskRecord


def find_idle_workers(
    run: Run, paths: RoundPaths, *, excluded_nodes: Collection[str]
) -> Mapping[str, list[str]]:
    """Return the idle workers of earlier attempts: class -> running tasks with nothing to do."""
    idle: dict[str, list[str]] = defaultdict(list)
    if not run.config.scheduler.linger_minutes:
        return idle
    attempts = [*attempts_of(paths.previous.attempt), *attempts_of(paths.attempt)]
    records = {
        record.task: record
        for attempt in attempts
        for path in attempt.task_files()
        # another user's worker has another secret: what it signs would be refused
        if path.stat().st_uid == os.geteuid() and (record := TaskRecord.glance(path))
    }
    running = set(_running(run, [task for a in attempts for task in all_tasks(run, a)]))
    for task, record in sorted(records.items()):
        is_idle = task in running and record.state == "lingering"
        if is_idle and record.node not in excluded_nodes:
            idle[record.worker_class].append(task)
    return idle


def all_tasks(run: Run, attempt: AttemptPaths) -> list[str]:
    """Return all tasks of an attempt: its own and those that it took over."""
    plan = run.known_records.find(SubmissionRecord, attempt.submission)
    if plan is None or not is_of_run(plan, run.record.run_id):
        return []
    if plan.adopted and plan.user not in {None, os.geteuid()}:
        run.scheduler.attribute(plan.adopted, plan.user)
    return [*known_tasks(run, attempt), *plan.adopted]


def busy_tasks(run: Run, attempt: AttemptPaths) -> list[str]:
    """Return the tasks of an attempt that may still train: not ended and not idle."""
    ids = all_tasks(run, attempt)
    states = run.scheduler.states(ids) if ids else {}
    alive = [task for task, state in states.items() if state is not TaskState.GONE]
    if not run.config.scheduler.linger_minutes:
        return alive
    return [task for task in alive if not _is_idle(run, attempt, task, states[task])]


def _is_idle(run: Run, attempt: AttemptPaths, task: str, state: TaskState) -> bool:
    record = run.known_records.glance(TaskRecord, attempt.task(task))
    return state is TaskState.RUNNING and record is not None and record.state == "lingering"


def _running(run: Run, ids: list[str]) -> Iterator[str]:
    states = run.scheduler.states(ids) if ids else {}
    return (task for task, state in states.items() if state is TaskState.RUNNING)
