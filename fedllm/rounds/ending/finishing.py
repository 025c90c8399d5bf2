"""End of a round: write its record and the metrics, then prune what retention does not keep."""

from fedllm.planning.evaluation_targets import is_evaluated
from fedllm.reporting.results.metrics import headline, write_metrics
from fedllm.reporting.task_times import task_times
from fedllm.reporting.trackers.trackers import export_rounds
from fedllm.reporting.usage import round_usage
from fedllm.rounds.retention import prune
from fedllm.rounds.run import Run
from fedllm.storage.kept_records import TasksRecord
from fedllm.storage.records import (
    AggregateRecord,
    CollectionRecord,
    EvaluationRecord,
    RoundRecord,
)
from fedllm.storage.updates import update_files


def finish_rounds(run: Run, last: int) -> bool:
    """Finish the rounds up to `last` whose state and evaluation exist; return whether all are."""
    done = True
    finished = False
    for number in range(run.observations.done, last + 1):
        if run.paths.round(number).record.exists():
            # all rounds before it are done too: they need no second look
            run.observations.done += run.observations.done == number
            continue
        if _may_finish(run, number):
            _finish(run, number)
            finished = True
        else:
            done = False
    if finished:
        write_metrics(run.paths)
        export_rounds(run.paths, run.config, run.say)
        run.lease.check()
        prune(run.paths, run.config)
    return done


def _may_finish(run: Run, number: int) -> bool:
    paths = run.paths.round(number)
    if not paths.aggregate_record.exists():
        return False
    due = is_evaluated(run.config.evaluation, number, run.last_round)
    return paths.evaluation_record.exists() or not due


def _finish(run: Run, number: int) -> None:
    paths = run.paths.round(number)
    aggregated = AggregateRecord.read(paths.aggregate_record)
    collection = CollectionRecord.find(paths.collection)
    used = {update.file for update in collection.updates} if collection else set()
    late = sum(name not in used for name in update_files(paths))
    usage = round_usage(paths)
    record = RoundRecord(
        round=number,
        lease=run.lease.number,
        state_sha256=aggregated.sha256,
        clients=len(collection.updates) if collection else 0,
        failed=len(collection.failed) if collection else 0,
        late=late,
        refused=collection.refused if collection else 0,
        tasks=usage.tasks,
        busy_seconds=usage.busy_seconds,
        allocated_seconds=usage.allocated_seconds,
        gpu_seconds=usage.gpu_seconds,
    )
    run.publish(TasksRecord(round=number, tasks=task_times(paths)), paths.tasks)
    run.freeze(record, paths.record)
    evaluation = EvaluationRecord.find(paths.evaluation_record)
    loss = collection.training.get("training_loss") if collection else None
    training = "" if loss is None else f"; training loss {loss:.3f}"
    run.say(f"round {number}/{run.config.rounds}: done{training}{headline(evaluation)}")
