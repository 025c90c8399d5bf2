"""The attempts of a round: until enough clients of the cohort have a published update."""

import dataclasses

from fedllm.errors import FedllmError, Incomplete, RunFailed, StorageFull, UserError
from fedllm.planning.cohorts import quorum_of
from fedllm.planning.federation import Federation
from fedllm.rounds.collecting import replaced_clients
from fedllm.rounds.dispatch.attempts import start_attempt
from fedllm.rounds.dispatch.idle_workers import busy_tasks
from fedllm.rounds.dispatch.submissions import error_of, find_unrecorded, is_mine
from fedllm.rounds.dispatch.waves import send_waves
from fedllm.rounds.dispatch.worker_failures import (
    cancel_queued_tasks,
    cancel_silent_workers,
    close_attempt,
    count_fruitless_attempts,
    waiting_and_running,
)
from fedllm.rounds.run import Run
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import AttemptPaths, RoundPaths, backup_name
from fedllm.storage.publishing.publish import age_seconds
from fedllm.storage.records import CohortClient, CohortRecord, ErrorRecord
from fedllm.storage.updates import PublishedUpdate, Scan, norm_problem, shape_problem

# the longest pause between looks at workers, in multiples of `scheduler.query_seconds`
_MOST_QUERIES = 5


def train(run: Run, federation: Federation, cohort: CohortRecord) -> Scan | None:
    """Make progress on the round's updates; return them once the round may go on without more.

    Raises:
        RunFailed: attempts ended without progress and the quorum is missed.
    """
    paths = run.paths.round(cohort.round)
    scan = scan_updates(run, federation, cohort)
    number = run.observations.attempts.get(cohort.round) or paths.last_attempt()
    if has_enough_updates(run, cohort, scan, paths):
        _end_stragglers(run, paths, number, cohort, scan)
        return scan
    if number:
        attempt = paths.attempt(number)
        if _goes_on(run, attempt, cohort) or not run.known_records.wait_is_over(attempt.root):
            run.observations.training_seconds = run.observations.training_seconds_of(attempt.root)
            return None
        # what was published while the tasks were found gone
        scan = scan_updates(run, federation, cohort)
        close_attempt(run, attempt)
        if has_enough_updates(run, cohort, scan, paths) or not _may_retry(
            run, attempt, scan, cohort
        ):
            return scan
    wanted = replaced_clients(run, paths)
    missing = [c for c in _missing(cohort, scan) if wanted is None or c.id in wanted]
    start_attempt(run, federation, cohort, missing, number + 1)
    run.observations.attempts[cohort.round] = number + 1
    # an inline scheduler is through by now
    scan = scan_updates(run, federation, cohort)
    return scan if has_enough_updates(run, cohort, scan, paths) else None


def has_enough_updates(run: Run, cohort: CohortRecord, scan: Scan, paths: RoundPaths) -> bool:
    """Say whether a round needs no further update.

    All clients sent one, or as many valid ones came as the cohort was to have, or the quorum did
    by the deadline. A round whose collection was replaced needs the same clients again.
    """
    if len(scan.published) == len(cohort.clients):
        return True
    before = replaced_clients(run, paths)
    if before is not None:
        return before <= scan.published.keys()
    if cohort.enough is not None and scan.valid >= cohort.enough:
        return True
    minutes = run.config.clients.deadline_minutes
    if minutes is None or scan.valid < quorum_of(run.config.clients, cohort):
        return False
    return age_seconds(paths.cohort) >= 60.0 * minutes


def scan_updates(run: Run, federation: Federation, cohort: CohortRecord) -> Scan:
    """Scan the round's updates and set aside those that are truncated, foreign or misshapen."""
    modules = federation.prepared.modules
    sides = {name: (m.out_features, m.in_features) for name, m in modules.items()}
    tiers = run.observations.tiers_of(cohort)

    def problem(update: PublishedUpdate) -> str | None:
        tier = tiers.get(update.record.client)
        if tier is None:
            return "it is not in the cohort"
        problem = shape_problem(update, cohort.ranks[tier], sides)
        needed = run.config.aggregation.outliers != "keep"
        return problem or (norm_problem(update) if needed else None)

    scanner = run.known_records.scanner(cohort, problem)
    scan = scanner.scan()
    moved = [name for name, why in scan.damaged.items() if _set_aside(run, cohort, name, why)]
    for name in moved:
        scanner.forget(name)
    return dataclasses.replace(scanner.scan(), damaged={}) if moved else scan


def _set_aside(run: Run, cohort: CohortRecord, name: str, problem: str) -> bool:
    path = run.paths.round(cohort.round).updates / name
    if not run.known_records.wait_is_over(path):
        return False
    run.lease.check()
    path.rename(backup_name(path, "damaged"))
    run.say(f"round {cohort.round}: {name}: {problem}; set aside, its clients train again")
    return True


def _goes_on(run: Run, attempt: AttemptPaths, cohort: CohortRecord) -> bool:
    """Say whether an attempt has workers that train, or will have."""
    if not run.observations.is_due(("workers", attempt.root), _pause_seconds(run, attempt)):
        return True
    everything_sent = send_waves(run, attempt, run.paths.logs(cohort.round))
    cancel_silent_workers(run, attempt)
    if everything_sent:
        cancel_queued_tasks(run, attempt)
    goes_on = bool(busy_tasks(run, attempt)) or not everything_sent
    if not goes_on:
        run.observations.look_again(("workers", attempt.root))
    return goes_on


def _pause_seconds(run: Run, attempt: AttemptPaths) -> float:
    """Return how long the scheduler's answers last: of long training a hundredth of its time."""
    query_seconds = traits_of(run.config).query_seconds
    trained = run.observations.training_seconds_of(attempt.root)
    # half a query's time, so that other pauses of a query are not doubled
    return max(query_seconds / 2, min(_MOST_QUERIES * query_seconds, trained / 100))


def _end_stragglers(
    run: Run, paths: RoundPaths, number: int, cohort: CohortRecord, scan: Scan
) -> None:
    """End workers that a round needs no more; those that linger or end by themselves may stay."""
    attempt = paths.attempt(number)
    if not number:
        return
    find_unrecorded(run, attempt)
    waiting, running = waiting_and_running(run, attempt)
    late = len(scan.published) < len(cohort.clients)
    if late:
        run.say(
            f"round {cohort.round}: goes on with {scan.valid} of {len(cohort.clients)} clients; "
            f"{len(running)} tasks were at work"
        )
    ended = waiting + (running if late and not run.config.scheduler.linger_minutes else [])
    if ended:
        run.lease.check()
        run.scheduler.cancel(ended)


def _missing(cohort: CohortRecord, scan: Scan) -> list[CohortClient]:
    return [client for client in cohort.clients if client.id not in scan.published]


def _may_retry(run: Run, attempt: AttemptPaths, scan: Scan, cohort: CohortRecord) -> bool:
    """Say whether the next attempt may start; False where the quorum is met without it.

    Raises:
        FedllmError: what a task said, when it is for the user to change, or attempts are used up.
    """
    error = _told(run, attempt)
    brought = any(u.record.attempt == attempt.number for u in scan.published.values())
    # where others of the attempt trained it may be one node's fault; a full disk is everybody's
    if isinstance(error, UserError | Incomplete) and (_is_full(attempt) or not brought):
        raise error
    if count_fruitless_attempts(run, attempt, scan) < run.config.scheduler.max_attempts:
        return True
    if scan.valid >= quorum_of(run.config.clients, cohort):
        return False
    missing = ", ".join(client.id for client in _missing(cohort, scan)[:5])
    logs = run.paths.logs(cohort.round)
    endings = close_attempt(run, attempt).endings
    ended = "; ".join(f"{task}: {ending}" for task, ending in list(endings.items())[:3])
    raise error or RunFailed(
        f"round {cohort.round}: no update from {missing} after {attempt.number} attempts"
        f"{f' ({ended})' if ended else ''}; see {logs}"
    )


def _is_full(attempt: AttemptPaths) -> bool:
    errors = map(ErrorRecord.read, attempt.task_errors())
    return any(error.kind == StorageFull.__name__ for error in errors)


def _told(run: Run, attempt: AttemptPaths) -> FedllmError | None:
    """Return what a task of an attempt since a person's start recorded as its error."""
    errors = attempt.task_errors() if is_mine(run, attempt) else []
    return error_of(ErrorRecord.read(errors[0])) if errors else None
