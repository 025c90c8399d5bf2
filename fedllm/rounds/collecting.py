"""Collection: freeze the updates of a round before anything is computed from them."""

import contextlib
from collections.abc import Mapping, Sequence
from statistics import median_high

from fedllm.errors import RunFailed, counted
from fedllm.planning.cohorts import quorum_of
from fedllm.planning.engines import engines_of
from fedllm.reporting.status.same_reasons import reason_line, same_reasons
from fedllm.rounds.keeping import clients_record
from fedllm.rounds.outliers import CheckedUpdates, UnreadableUpdateError, check_outliers, clipped
from fedllm.rounds.run import Run
from fedllm.storage.checked import DamagedUpdateError
from fedllm.storage.paths import JobPaths, RoundPaths, attempts_of, backup_name, names_in
from fedllm.storage.records import (
    CohortRecord,
    CollectedUpdate,
    CollectionRecord,
    ErrorRecord,
    PreparedRecord,
    TaskRecord,
    TierMix,
    training_metrics,
)
from fedllm.storage.updates import REFUSED, PublishedUpdate, Scan, check_update, count_refused


def collect(run: Run, cohort: CohortRecord, scan: Scan) -> CollectionRecord | None:
    """Freeze the round's valid updates, in the cohort's order.

    Updates that arrive later are late: they are counted and never used. If this collection replaces
    one with a damaged file, it takes the same clients with the same clipping, without those whose
    values no aggregation can use.

    Returns:
        The collection; None if a file changed since the scan, so that it must be scanned again.

    Raises:
        RunFailed: fewer valid updates than the quorum; it names clients, reasons and logs.
    """
    paths = run.paths.round(cohort.round)
    frozen = CollectionRecord.find(paths.collection)
    if frozen:
        return frozen
    first = replaced_collection(run, paths)
    taken = _taken(cohort, scan, {u.client for u in first.updates} if first else None)
    updates = [_collected(taken[c.id], c.tier) for c in cohort.clients if c.id in taken]
    try:
        checked = _clip_as_before(first, updates) if first else check_outliers(run, paths, updates)
    except UnreadableUpdateError as error:
        # the file changed since the scan: the next scan reads it again
        run.say(f"round {cohort.round}: {error}")
        run.known_records.forget_update(error.file)
        return None
    updates, failed = checked.updates, {**checked.rejected, **_failures(cohort, scan)}
    _require_quorum(run, cohort, len(updates), failed)
    _set_unneeded_aside(run, paths, scan)
    environments = _environments([taken[update.client] for update in updates])
    collection = CollectionRecord(
        round=cohort.round,
        lease=run.lease.number,
        updates=updates,
        failed=failed,
        missing=[c.id for c in cohort.clients if c.id not in scan.published],
        replaces=sum(
            name.startswith(f"{paths.collection.name}.replaced-") for name in names_in(paths.root)
        ),
        refused=count_refused(paths),
        environments=environments,
        tiers=tier_mix(cohort, scan, {update.client for update in updates}),
        startup_seconds=_startup_seconds(paths),
        training=training_metrics([taken[update.client].record for update in updates]),
    )
    _log_collection(run, collection, scan, checked.rejected)
    prepared = run.known_records.read(PreparedRecord, run.paths.prepared)
    run.publish(clients_record(cohort, prepared, scan, collection), paths.clients)
    run.freeze(collection, paths.collection)
    return collection


def _taken(cohort: CohortRecord, scan: Scan, before: set[str] | None) -> dict[str, PublishedUpdate]:
    """Return client -> valid update; only of the clients in `before`, if given."""
    published = {c.id: scan.published[c.id] for c in cohort.clients if c.id in scan.published}
    return {
        client: update
        for client, update in published.items()
        if update.record.status == "ok" and (before is None or client in before)
    }


def _failures(cohort: CohortRecord, scan: Scan) -> dict[str, str]:
    """Return client -> why it failed to train."""
    records = [scan.published[c.id].record for c in cohort.clients if c.id in scan.published]
    return {
        record.client: f"{record.reason} (log {record.log})"
        for record in records
        if record.status == "failed"
    }


def _clip_as_before(first: CollectionRecord, updates: Sequence[CollectedUpdate]) -> CheckedUpdates:
    """Clip clients as the replaced collection did: without all its clients the median differs."""
    clips = {update.client: update.clipped for update in first.updates}
    return CheckedUpdates(
        updates=[clipped(update, clips[update.client]) for update in updates],
        rejected=first.failed,
    )


def _environments(taken: Sequence[PublishedUpdate]) -> list[dict[str, str]]:
    """Return the distinct environments that clients trained in, in the updates' order."""
    environments: list[dict[str, str]] = []
    for update in taken:
        for environment in (update.record.environment, *update.record.earlier_environments):
            if environment not in environments:
                environments.append(environment)
    return environments


def _log_collection(
    run: Run, collection: CollectionRecord, scan: Scan, rejected: Mapping[str, str]
) -> None:
    number = collection.round
    for update in scan.duplicates:
        counts = scan.published[update.record.client].file
        run.say(
            f"round {number}: {update.file}: client {update.record.client} sent another update; "
            f"that of {counts} counts"
        )
    for client, why in rejected.items():
        run.say(f"round {number}: {client} is left out: {why}")
    refused = (
        f"; {counted(collection.refused, 'update file')} refused" if collection.refused else ""
    )
    run.say(f"round {number}: collected {_describe(collection)}{refused}")
    tiers = {update.tier for update in collection.updates}
    engines = {engine for tier, engine in engines_of(run.config).items() if tier in tiers}
    # each engine has an environment of its own
    if len(collection.environments) > len(engines):
        run.say(
            f"round {number}: clients trained in {len(collection.environments)} environments, so "
            "a rerun need not be bit-identical; collection.json lists them"
        )


def tier_mix(cohort: CohortRecord, scan: Scan, used: set[str]) -> dict[str, TierMix]:
    """Return tier -> clients drawn and used, tokens and seconds.

    If a round does not wait for all its clients, it uses more of those in fast tiers.
    """
    mix: dict[str, TierMix] = {}
    for tier in cohort.ranks:
        drawn = [client for client in cohort.clients if client.tier == tier]
        mine = [client for client in drawn if client.id in used]
        mix[tier] = TierMix(
            drawn=len(drawn),
            used=len(mine),
            tokens=sum(client.cost for client in mine),
            seconds=sum(scan.published[client.id].record.seconds for client in mine),
        )
    return mix


def _describe(collection: CollectionRecord) -> str:
    drawn = sum(mix.drawn for mix in collection.tiers.values())
    if len(collection.updates) == drawn:
        return f"{drawn} of {counted(drawn, 'client')}"
    mix = ", ".join(f"{tier} {m.used}/{m.drawn}" for tier, m in collection.tiers.items())
    return f"{len(collection.updates)} of {counted(drawn, 'client')} ({mix})"


def _startup_seconds(paths: RoundPaths) -> float | None:
    """Return the median seconds that a round's workers needed before they trained, if known."""
    attempts = attempts_of(paths.attempt)
    records = [TaskRecord.glance(path) for attempt in attempts for path in attempt.task_files()]
    known = [record.startup_seconds for record in records if record and record.startup_seconds]
    return median_high(known) if known else None


def reopen_if_damaged(run: Run, paths: RoundPaths) -> bool:
    """Set a collection aside if its files are not as they were frozen; return whether it was.

    Call this only after an aggregation failed, as it reads every tensor; scans read only headers.
    It sets the damaged files aside too. Their clients train again and send the same update, as
    training depends only on their identity.
    """
    collection = CollectionRecord.read(paths.collection)
    problems: dict[str, str] = {}
    for name, sha256 in {update.file: update.sha256 for update in collection.updates}.items():
        problem = _problem(paths, name, sha256)
        if problem:
            problems[name] = problem
    for name, problem in problems.items():
        run.say(f"round {paths.number}: {paths.updates / name}: {problem}; its clients train again")
        set_aside(run, paths, name)
    if problems:
        _replace(run, paths)
    return bool(problems)


def set_aside(run: Run, paths: RoundPaths, name: str) -> None:
    """Set an update file aside, so that it is counted and no scan reads it; it may be gone."""
    run.lease.check()
    with contextlib.suppress(FileNotFoundError):
        (paths.updates / name).rename(backup_name(paths.updates / name, REFUSED))


def _set_unneeded_aside(run: Run, paths: RoundPaths, scan: Scan) -> None:
    """Set aside the bad files of a round that needs no update of theirs, so that they count."""
    for name, problem in scan.damaged.items():
        set_aside(run, paths, name)
        run.say(f"round {paths.number}: {name}: {problem}; set aside")


def leave_out_bad(run: Run, paths: RoundPaths) -> bool:
    """Set a collection aside if its aggregation named clients with unusable updates.

    The aggregation's error record stays beside it, so the next collection leaves these clients out:
    they would send the same update if they trained again. The quorum decides whether the round
    goes on.

    Returns:
        Whether the collection was set aside.
    """
    bad = _bad_clients(run, paths)
    collection = CollectionRecord.read(paths.collection)
    if not any(update.client in bad for update in collection.updates):
        return False
    run.lease.check()
    _replace(run, paths)
    return True


def _bad_clients(run: Run, paths: RoundPaths) -> dict[str, str]:
    """Return client -> problem of the updates that stopped an aggregation of the round."""
    attempts = paths.aggregate_attempts
    places: dict[int, str] = {}
    for folder in sorted(names_in(attempts.parent)):
        if not folder.startswith(attempts.name):
            continue
        for name in sorted(names_in(attempts.parent / folder)):
            job = JobPaths(root=attempts.parent / folder / name)
            error = run.known_records.find(ErrorRecord, job.error)
            places |= error.bad_places if error else {}
    if not places:
        return {}
    clients = run.known_records.read(CohortRecord, paths.cohort).clients
    return {clients[place].id: why for place, why in places.items()}


def _replace(run: Run, paths: RoundPaths) -> None:
    # the collection is moved last: if killed in between, old errors do not count for the new one
    if paths.aggregate_attempts.exists():
        paths.aggregate_attempts.rename(backup_name(paths.aggregate_attempts, "replaced"))
    paths.collection.rename(backup_name(paths.collection, "replaced"))
    run.known_records.forget_updates()


def _problem(paths: RoundPaths, name: str, sha256: str) -> str | None:
    try:
        published = check_update(paths.updates / name)
    except FileNotFoundError:
        return "missing"
    except DamagedUpdateError as error:
        return str(error)
    is_same = bool(published) and published[0].sha256 == sha256
    return None if is_same else "not the file that was collected"


def replaced_collection(run: Run, paths: RoundPaths) -> CollectionRecord | None:
    """Return the first replaced collection, if any, without clients that were left out since."""
    path = paths.collection.with_name(f"{paths.collection.name}.replaced-1")
    first = run.known_records.find(CollectionRecord, path)
    bad = _bad_clients(run, paths) if first else {}
    if not first or not bad:
        return first
    kept = [update for update in first.updates if update.client not in bad]
    return first.model_copy(update={"updates": kept, "failed": {**first.failed, **bad}})


def replaced_clients(run: Run, paths: RoundPaths) -> set[str] | None:
    """Return the clients that the new collection needs if one was replaced, else None."""
    record = replaced_collection(run, paths)
    return {update.client for update in record.updates} if record else None


def _collected(update: PublishedUpdate, tier: str) -> CollectedUpdate:
    return CollectedUpdate(
        client=update.record.client,
        tier=tier,
        attempt=update.record.attempt,
        file=update.file,
        sha256=update.sha256,
        weight=float(update.record.rows),
        notes=update.record.notes,
    )


def _require_quorum(run: Run, cohort: CohortRecord, valid: int, failed: dict[str, str]) -> None:
    needed = quorum_of(run.config.clients, cohort)
    if valid >= needed:
        return
    same = list(same_reasons(failed).items())[:3]
    reasons = "; ".join(reason_line(reason, clients) for reason, clients in same)
    raise RunFailed(
        f"round {cohort.round}: {counted(valid, 'valid update')} of "
        f"{counted(len(cohort.clients), 'client')}, clients.quorum needs {needed}; {reasons}"
    )
