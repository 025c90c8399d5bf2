"""Status of a round's attempts: the tasks at work, and how others ended."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedllm.reporting.status.queue import SUSPENDED
from fedllm.storage.paths import AttemptPaths, RoundPaths
from fedllm.storage.record_cache import RecordCache
from fedllm.storage.records import (
    ClaimRecord,
    ErrorRecord,
    JobsRecord,
    OutcomeRecord,
    SubmissionRecord,
    TaskRecord,
)

GONE = "gone"


@dataclass(frozen=True, kw_only=True)
class TaskStatus:
    """A task at work, from its last record: `seconds` since its start, `held` unpublished clients.

    `state` is starting, training or lingering; suspended if the scheduler says so; gone if the task
    ended before it published the held clients. `clients` are in training together, `client` is the
    first of them.
    """

    task: str
    state: str
    node: str
    log: str
    client: str | None
    clients: tuple[str, ...]
    step: int
    clients_done: int
    held: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EndingStatus:
    """Tasks with the same ending: `state` in the scheduler's words, their nodes, and one log."""

    state: str
    tasks: int
    nodes: tuple[str, ...]
    log: str


@dataclass(frozen=True, kw_only=True)
class AttemptStatus:
    """One attempt of a round: tasks planned and submitted so far, bundles planned and claimed."""

    attempt: int
    tasks_wanted: int
    tasks_submitted: int
    tasks_adopted: int
    bundles: int
    bundles_claimed: int
    endings: tuple[EndingStatus, ...] = ()
    cancelled: Mapping[str, int] = field(default_factory=dict)
    excluded_nodes: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttemptWork:
    """The attempts of a round, and the tasks of the last one."""

    attempts: tuple[AttemptStatus, ...]
    tasks: tuple[TaskStatus, ...]
    claimed: int


def attempt_work(
    records: RecordCache,
    paths: RoundPaths,
    published: Collection[str],
    states: Mapping[str, str],
    *,
    all_gone: bool = False,
) -> AttemptWork:
    """Read the status of a round's attempts.

    Args:
        records: the records read before.
        paths: the round.
        published: clients that have an update.
        states: the scheduler's states of tasks, as far as known.
        all_gone: whether the tasks ended with their coordinator.
    """
    attempts: list[AttemptStatus] = []
    last: tuple[AttemptPaths, SubmissionRecord, list[ClaimRecord]] | None = None
    while plan := records.find(
        SubmissionRecord, (attempt := paths.attempt(len(attempts) + 1)).submission
    ):
        claims = records.all(ClaimRecord, attempt.claim_files())
        attempts.append(_attempt(records, attempt, plan, len(claims)))
        last = (attempt, plan, claims)
    if last is None:
        return AttemptWork(attempts=(), tasks=(), claimed=0)
    attempt, plan, claims = last
    held = _unpublished_clients(plan, claims, published)
    known = dict.fromkeys(held, GONE) if all_gone else states
    tasks = _tasks(records, attempt, held, claims, known)
    return AttemptWork(
        attempts=tuple(attempts),
        tasks=tuple(tasks),
        claimed=sum(task.held for task in tasks if task.state != GONE),
    )


def _attempt(
    records: RecordCache, paths: AttemptPaths, plan: SubmissionRecord, claimed: int
) -> AttemptStatus:
    outcome = records.find(OutcomeRecord, paths.outcome)
    jobs = records.find(JobsRecord, paths.jobs)
    submitted = sum(map(len, jobs.ids.values())) if jobs else 0
    planned = sum(array.tasks for array in plan.arrays)
    wanted = sum(workers.tasks for workers in plan.workers.values())
    errors = records.all(ErrorRecord, paths.task_errors())
    return AttemptStatus(
        attempt=paths.number,
        tasks_wanted=max(wanted, planned),
        tasks_submitted=submitted,
        tasks_adopted=len(plan.adopted),
        bundles=len(plan.bundles),
        bundles_claimed=claimed,
        endings=_endings(outcome) if outcome else (),
        cancelled=dict(Counter(outcome.cancelled.values())) if outcome else {},
        excluded_nodes=tuple(plan.excluded_nodes),
        errors=tuple(dict.fromkeys(f"{e.message} (log {e.log})" for e in errors)),
    )


def _endings(outcome: OutcomeRecord) -> tuple[EndingStatus, ...]:
    tasks_by_state: dict[str, list[str]] = defaultdict(list)
    for task, ending in outcome.endings.items():
        tasks_by_state[ending.state].append(task)
    return tuple(
        EndingStatus(
            state=state,
            tasks=len(tasks),
            nodes=tuple(sorted({n for t in tasks if (n := outcome.endings[t].node)})),
            log=next((log for t in tasks if (log := outcome.endings[t].log)), ""),
        )
        for state, tasks in sorted(tasks_by_state.items())
    )


def _unpublished_clients(
    plan: SubmissionRecord, claims: list[ClaimRecord], published: Collection[str]
) -> dict[str, int]:
    """Return how many clients each task claimed that have no update yet."""
    clients = {bundle.number: bundle.clients for bundle in plan.bundles}
    held: dict[str, int] = {}
    for claim in claims:
        unpublished = sum(client not in published for client in clients.get(claim.bundle, ()))
        held[claim.task] = held.get(claim.task, 0) + unpublished
    return held


def _tasks(
    records: RecordCache,
    attempt: AttemptPaths,
    held: Mapping[str, int],
    claims: list[ClaimRecord],
    states: Mapping[str, str],
) -> list[TaskStatus]:
    """Return the tasks that hold clients or whose record says that they work."""
    records_of_tasks = {r.task: r for r in records.all(TaskRecord, attempt.task_files())}
    claimed = {claim.task: claim for claim in claims}
    tasks: list[TaskStatus] = []
    for task in sorted({*held, *records_of_tasks}, key=_task_order):
        record, claim = records_of_tasks.get(task), claimed.get(task)
        unpublished = held.get(task, 0)
        gone = states.get(task) == GONE
        if not unpublished and (gone or record is None or record.state == "ended"):
            continue
        state: str = record.state if record else "starting"
        if states.get(task) == SUSPENDED:
            state = SUSPENDED
        tasks.append(
            TaskStatus(
                task=task,
                state=GONE if gone or state == "ended" else state,
                node=record.node if record else claim.node if claim else "",
                log=claim.log if claim else "",
                client=record.client if record else None,
                clients=tuple(record.clients) if record else (),
                step=record.step if record else 0,
                clients_done=record.clients_done if record else 0,
                held=unpublished,
                seconds=record.allocated_seconds if record else 0.0,
            )
        )
    return tasks


def _task_order(task: str) -> tuple[tuple[int, str], ...]:
    """Return the sort key of a task id: `7_10` comes after `7_9`."""
    return tuple((int(part), "") if part.isdigit() else (0, part) for part in task.split("_"))
