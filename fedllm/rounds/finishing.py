"""What is left of a round: its record, the metrics, and what retention removes."""

import shutil

from fedllm.planning.evaluation import is_evaluated
from fedllm.reporting.metrics import headline, write_metrics
from fedllm.rounds.run import Run
from fedllm.storage.records import (
    AggregateRecord,
    CollectionRecord,
    EvaluationRecord,
    RoundRecord,
)
from fedllm.storage.updates import update_files


def finish_rounds(run: Run) -> bool:
    """Complete every round whose state and evaluation exist; say whether all rounds are done."""
    done = True
    finished = False
    for number in range(run.config.rounds + 1):
        if run.paths.round(number).record.exists():
            continue
        if _may_finish(run, number):
            _finish(run, number)
            finished = True
        else:
            done = False
    if finished:
        write_metrics(run.paths)
        prune(run)
    return done


def _may_finish(run: Run, number: int) -> bool:
    paths = run.paths.round(number)
    if not paths.aggregate_record.exists():
        return False
    due = is_evaluated(run.config.evaluation, number, run.config.rounds)
    return paths.evaluation_record.exists() or not due


def _finish(run: Run, number: int) -> None:
    paths = run.paths.round(number)
    aggregated = AggregateRecord.read(paths.aggregate_record)
    collection = CollectionRecord.find(paths.collection)
    used = {update.file for update in collection.updates} if collection else set()
    late = sum(name not in used for name in update_files(paths))
    record = RoundRecord(
        round=number,
        lease=run.lease.number,
        state_sha256=aggregated.sha256,
        clients=len(collection.updates) if collection else 0,
        failed=len(collection.failed) if collection else 0,
        late=late,
    )
    run.publish(record, paths.record)
    evaluation = EvaluationRecord.find(paths.evaluation_record)
    run.say(f"round {number}/{run.config.rounds}: done{headline(evaluation)}")


def prune(run: Run) -> None:
    """Remove what retention does not keep.

    Updates stay until the next round is aggregated; states of the last `storage.keep_states`
    rounds, of every `storage.keep_every`-th, and of the best evaluated one stay.
    """
    rounds = [run.paths.round(n) for n in range(run.config.rounds + 1)]
    complete = [paths for paths in rounds if paths.record.exists()]
    kept = {paths.number for paths in complete[-run.config.storage.keep_states :]}
    kept |= {p.number for p in complete if p.number % run.config.storage.keep_every == 0}
    kept |= best_round(run)
    for paths in complete:
        following = run.paths.round(paths.number + 1)
        if following.aggregate_record.exists() and paths.updates.exists():
            shutil.rmtree(paths.updates)
            shutil.rmtree(paths.checkpoints, ignore_errors=True)
        if following.aggregate_record.exists() and paths.number not in kept:
            paths.global_state.unlink(missing_ok=True)
        for unfinished in paths.aggregate.glob(".*.part"):
            unfinished.unlink(missing_ok=True)


def best_round(run: Run) -> set[int]:
    """Return the evaluated round of the lowest mean loss on dev clients, else on all scored.

    Only evaluations of the same clients and rows compare: the ones that most rounds have.
    """
    losses: dict[tuple[tuple[str, int], ...], dict[int, float]] = {}
    for number in range(run.config.rounds + 1):
        record = EvaluationRecord.find(run.paths.round(number).evaluation_record)
        if record and record.clients:
            dev = [c for c in record.clients if c.group == "dev"] or record.clients
            scored = tuple((c.client, c.as_deployed.rows) for c in dev)
            mean = sum(c.as_deployed.loss for c in dev) / len(dev)
            losses.setdefault(scored, {})[number] = mean
    if not losses:
        return set()
    usual = max(losses.values(), key=len)
    return {min(usual, key=lambda number: usual[number])}
