"""Training of a round: attempts until enough clients of the cohort published an update."""

from fedllm.config.scales import client_scales
from fedllm.errors import FedllmError, Incomplete, RunFailed, StorageFull, UserError, counted
from fedllm.planning.cohorts import quorum_of
from fedllm.planning.federation import Federation
from fedllm.rounds.collecting import replaced_clients, set_aside
from fedllm.rounds.dispatch.attempts import start_attempt
from fedllm.rounds.dispatch.cancelling import end_tasks
from fedllm.rounds.dispatch.idle_workers import busy_tasks
from fedllm.rounds.dispatch.submissions import error_of, find_unrecorded, is_since_start
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
from fedllm.storage.paths import AttemptPaths, RoundPaths
from fedllm.storage.publishing.publish import age_seconds
from fedllm.storage.records import CohortClient, CohortRecord, ErrorRecord
from fedllm.storage.trust.secret import user_secret
from fedllm.storage.trust.signatures import RoundKeys
from fedllm.storage.update_problems import Expected, update_problem
from fedllm.storage.updates import PublishedUpdate, Scan

# the longest pause between looks at workers, in multiples of `scheduler.query_seconds`
_MAX_QUERIES = 5


def train(run: Run, federation: Federation, cohort: CohortRecord) -> Scan | None:
    """Make progress on the round's updates; return the scan once the round needs no more of them.

    Raises:
        RunFailed: attempts ended without progress and the quorum is missed.
    """
    paths = run.paths.round(cohort.round)
    scan = scan_updates(run, federation, cohort)
    number = run.observations.attempts.get(cohort.round) or paths.last_attempt()
    if has_enough_updates(run, cohort, scan, paths):
        _cancel_surplus(run, paths, number, cohort, scan)
        return scan
    if number:
        attempt = paths.attempt(number)
        if _is_running(run, attempt, cohort) or not run.known_records.wait_is_over(attempt.root):
            run.observations.training_seconds = run.observations.training_seconds_of(attempt.root)
            return None
        # updates may have been published while the tasks ended
        scan = scan_updates(run, federation, cohort)
        close_attempt(run, attempt)
        if has_enough_updates(run, cohort, scan, paths) or not _may_retry(
            run, attempt, scan, cohort
        ):
            return scan
    needed = replaced_clients(run, paths)
    missing = [c for c in _missing(cohort, scan) if needed is None or c.id in needed]
    start_attempt(run, federation, cohort, missing, number + 1)
    run.observations.attempts[cohort.round] = number + 1
    # an inline scheduler has run all tasks by now
    scan = scan_updates(run, federation, cohort)
    return scan if has_enough_updates(run, cohort, scan, paths) else None


def has_enough_updates(run: Run, cohort: CohortRecord, scan: Scan, paths: RoundPaths) -> bool:
    """Return whether a round has enough updates.

    It has if all clients sent one; if over-sampled, once the configured number of valid ones came;
    after the deadline, once the quorum came. If its collection was replaced, it needs the same
    clients again.
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
    """Scan the round's updates; set aside the truncated, foreign, forged and impossible ones."""
    modules = federation.prepared.modules
    sides = {name: (m.out_features, m.in_features) for name, m in modules.items()}
    tiers = run.observations.tiers_of(cohort)
    own = {client.id: client.ranks for client in cohort.clients if client.ranks}

    keys = RoundKeys.of(user_secret(), cohort)

    def problem(update: PublishedUpdate) -> str | None:
        client = update.record.client
        if forged := keys.problem(update):
            return forged
        tier = tiers.get(client)
        if tier is None:
            return "it is not in the cohort"
        ranks = own.get(client) or cohort.ranks[tier]
        expected = Expected(
            ranks=ranks,
            sides=sides,
            max_rows=federation.clients[client].train_rows,
            scales=client_scales(run.config, ranks),
            sent=cohort.sent,
        )
        return update_problem(update, expected)

    scanner = run.known_records.scanner(cohort, problem)
    scan = scanner.scan()
    moved = [name for name, why in scan.damaged.items() if _set_aside(run, cohort, name, why)]
    for name in moved:
        scanner.forget(name)
    return scanner.scan() if moved else scan


def _set_aside(run: Run, cohort: CohortRecord, name: str, problem: str) -> bool:
    paths = run.paths.round(cohort.round)
    if not run.known_records.wait_is_over(paths.updates / name):
        return False
    set_aside(run, paths, name)
    run.say(f"round {cohort.round}: {name}: {problem}; set aside, its clients train again")
    return True


def _is_running(run: Run, attempt: AttemptPaths, cohort: CohortRecord) -> bool:
    """Return whether an attempt has workers that train, or will have."""
    if not run.observations.is_due(("workers", attempt.root), _pause_seconds(run, attempt)):
        return True
    all_submitted = send_waves(run, attempt, run.paths.logs(cohort.round))
    cancel_silent_workers(run, attempt)
    if all_submitted:
        cancel_queued_tasks(run, attempt)
    is_running = bool(busy_tasks(run, attempt)) or not all_submitted
    if not is_running:
        run.observations.look_again(("workers", attempt.root))
    return is_running


def _pause_seconds(run: Run, attempt: AttemptPaths) -> float:
    """Return the seconds for which the scheduler's answers are used: 1 % of a long training."""
    query_seconds = traits_of(run.config).query_seconds
    trained = run.observations.training_seconds_of(attempt.root)
    # at least half of query_seconds, so that other pauses of query_seconds are not doubled
    return max(query_seconds / 2, min(_MAX_QUERIES * query_seconds, trained / 100))


def _cancel_surplus(
    run: Run, paths: RoundPaths, number: int, cohort: CohortRecord, scan: Scan
) -> None:
    """Cancel workers that a round no longer needs; those that become idle or end soon may stay."""
    attempt = paths.attempt(number)
    if not number:
        return
    find_unrecorded(run, attempt)
    waiting, running = waiting_and_running(run, attempt)
    late = len(scan.published) < len(cohort.clients)
    if late:
        run.say(
            f"round {cohort.round}: goes on with {scan.valid} of "
            f"{counted(len(cohort.clients), 'client')}; still running: "
            f"{counted(len(running), 'task')}"
        )
    ends_running = late and not run.config.scheduler.linger_minutes
    if surplus := waiting + (running if ends_running else []):
        # otherwise one that started meanwhile finds nothing to do and ends by itself
        end_tasks(run, surplus, only_waiting=not ends_running)


def _missing(cohort: CohortRecord, scan: Scan) -> list[CohortClient]:
    return [client for client in cohort.clients if client.id not in scan.published]


def _may_retry(run: Run, attempt: AttemptPaths, scan: Scan, cohort: CohortRecord) -> bool:
    """Return whether the next attempt may start; False if the quorum is met without it.

    Raises:
        FedllmError: the user must change something, or `scheduler.max_attempts` attempts failed; it
            is the error that a task recorded, if any did.
    """
    error = _task_error(run, attempt)
    has_updates = any(u.record.attempt == attempt.number for u in scan.published.values())
    # if other tasks of the attempt sent updates, one node may be at fault; a full disk affects all
    if isinstance(error, UserError | Incomplete) and (_is_full(attempt) or not has_updates):
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


def _task_error(run: Run, attempt: AttemptPaths) -> FedllmError | None:
    """Return the first error that a task recorded, for attempts since a person started the run."""
    errors = attempt.task_errors() if is_since_start(run, attempt) else []
    return error_of(ErrorRecord.read(errors[0])) if errors else None
