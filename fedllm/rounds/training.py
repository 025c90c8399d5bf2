"""The attempts of a round: until every client of the cohort has a published update."""

import dataclasses

from fedllm.errors import FedllmError, Incomplete, RunFailed, UserError
from fedllm.planning.bundles import cut_bundles
from fedllm.planning.classes import tier_options
from fedllm.planning.cohorts import quorum_size
from fedllm.planning.federation import Federation
from fedllm.rounds.run import Run
from fedllm.rounds.submissions import array_name, error_of, is_active, last_attempt, submit
from fedllm.storage.paths import AttemptPaths, aside
from fedllm.storage.records import (
    ArrayRecord,
    CohortClient,
    CohortRecord,
    ErrorRecord,
    SubmissionRecord,
)
from fedllm.storage.updates import Scan, shape_problem


def train(run: Run, federation: Federation, cohort: CohortRecord) -> Scan | None:
    """Make progress on the round's updates; return them once the round may go on without more.

    Raises:
        RunFailed: attempts ended without progress and the quorum is missed.
    """
    scan = scan_updates(run, federation, cohort)
    missing = _missing(cohort, scan)
    if not missing:
        return scan
    paths = run.paths.round(cohort.round)
    number = last_attempt(paths.attempt)
    if number:
        attempt = paths.attempt(number)
        if is_active(run, attempt, run.paths.logs(cohort.round)) or not run.settled(attempt.root):
            return None
        # what was published while the tasks were found gone
        scan = scan_updates(run, federation, cohort)
        missing = _missing(cohort, scan)
        if not missing or not _may_retry(run, attempt, scan, cohort):
            return scan
    _start_attempt(run, federation, cohort, missing, number + 1)
    # an inline scheduler is through by now
    scan = scan_updates(run, federation, cohort)
    return None if _missing(cohort, scan) else scan


def scan_updates(run: Run, federation: Federation, cohort: CohortRecord) -> Scan:
    """Scan the round's updates and set aside those that are truncated, foreign or misshapen."""
    scanner = run.scanner(cohort.round, cohort.base_fingerprint)
    scan = scanner.scan()
    bad = dict(scan.damaged)
    tiers = {client.id: client.tier for client in cohort.clients}
    modules = federation.prepared.modules
    sides = {name: (m.out_features, m.in_features) for name, m in modules.items()}
    for id_, update in scan.published.items():
        if id_ not in tiers:
            bad[update.file] = f"client {id_} is not in the cohort"
        elif problem := shape_problem(update, cohort.ranks[tiers[id_]], sides):
            bad[update.file] = f"client {id_}: {problem}"
    for name, problem in bad.items():
        _set_aside(run, cohort.round, name, problem)
        scanner.forget(name)
    if not bad:
        return scan
    # a bad file that may still be on its way lies there yet: nothing of it counts
    again = scanner.scan()
    good = {id_: found for id_, found in again.published.items() if found.file not in bad}
    return dataclasses.replace(again, published=good)


def _set_aside(run: Run, round_number: int, name: str, problem: str) -> None:
    path = run.paths.round(round_number).updates / name
    if not run.settled(path):
        return
    run.lease.check()
    path.rename(aside(path, "damaged"))
    run.say(f"round {round_number}: {path.name}: {problem}; set aside, its clients train again")


def _missing(cohort: CohortRecord, scan: Scan) -> list[CohortClient]:
    return [client for client in cohort.clients if client.id not in scan.published]


def _may_retry(run: Run, attempt: AttemptPaths, scan: Scan, cohort: CohortRecord) -> bool:
    """Say whether the next attempt may start; False where the quorum is met without it.

    Raises:
        FedllmError: what a task said, when it is for the user to change, or attempts are used up.
    """
    error = _told(run, attempt)
    if isinstance(error, UserError | Incomplete):
        raise error
    if _fruitless(run, attempt, scan, cohort.round) < run.config.scheduler.max_attempts:
        return True
    valid = sum(u.record.status == "ok" for u in scan.published.values())
    if valid >= quorum_size(run.config.clients.quorum, len(cohort.clients)):
        return False
    missing = ", ".join(client.id for client in _missing(cohort, scan)[:5])
    raise error or RunFailed(
        f"round {cohort.round}: no update from {missing} after {attempt.number} attempts; "
        f"see {run.paths.logs(cohort.round)}"
    )


def _told(run: Run, attempt: AttemptPaths) -> FedllmError | None:
    """Return what a task of an attempt of this coordinator recorded as its error."""
    if SubmissionRecord.read(attempt.submission).lease != run.lease.number:
        return None
    errors = attempt.task_errors()
    return error_of(ErrorRecord.read(errors[0])) if errors else None


def _fruitless(run: Run, attempt: AttemptPaths, scan: Scan, round_number: int) -> int:
    """Return how many attempts of this coordinator, to the last, published nothing."""
    fruitful = {update.record.attempt for update in scan.published.values()}
    count = 0
    for number in range(attempt.number, 0, -1):
        paths = run.paths.round(round_number).attempt(number)
        mine = SubmissionRecord.read(paths.submission).lease == run.lease.number
        if number in fruitful or not mine:
            break
        count += 1
    return count


def _start_attempt(
    run: Run,
    federation: Federation,
    cohort: CohortRecord,
    missing: list[CohortClient],
    number: int,
) -> None:
    paths = run.paths.round(cohort.round)
    section = run.config.scheduler
    work = cut_bundles(
        missing,
        federation.classes,
        slots=run.scheduler.capacity({}).most_parallel,
        clients_per_bundle=section.clients_per_bundle,
    )
    token = array_name(run, cohort.round, f"a{number:02d}")
    arrays = [
        ArrayRecord(
            name=f"{token}-{name}-0",
            worker_class=name,
            tasks=min(tasks, sum(b.worker_class == name for b in work.bundles)),
            options=tier_options(section.sbatch, name),
        )
        for name, tasks in work.workers.items()
    ]
    attempt = paths.attempt(number)
    plan = SubmissionRecord(
        token=token,
        lease=run.lease.number,
        kind="client",
        command=[str(attempt.root)],
        arrays=arrays,
        bundles=work.bundles,
    )
    tasks = sum(array.tasks for array in arrays)
    run.say(
        f"round {cohort.round}/{run.config.rounds}: {len(missing)} clients in "
        f"{len(work.bundles)} bundles for {tasks} workers"
        + (f" (attempt {number})" if number > 1 else "")
    )
    submit(run, attempt, plan, run.paths.logs(cohort.round))
