"""Aggregation and evaluation: the server's two jobs of a round."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fedllm.errors import FedllmError, RunDirectoryError
from fedllm.planning.engines import engines_of, job_size
from fedllm.planning.evaluation_targets import (
    EvaluationPiece,
    bundles_of,
    is_evaluated,
    pieces_to_score,
    scorers_of,
)
from fedllm.planning.federation import Federation
from fedllm.rounds.collecting import leave_out_bad, reopen_if_damaged
from fedllm.rounds.dispatch.submissions import ONE_TASK, Shares, run_server_job
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import Scheduler
from fedllm.storage.fingerprints import sha256_of
from fedllm.storage.paths import EvaluationPaths, backup_name
from fedllm.storage.records import AggregateRecord


def aggregate(run: Run, number: int) -> AggregateRecord | None:
    """Make progress on a round's server state; return its record once it is complete.

    Raises:
        FedllmError: the job cannot succeed. Damaged updates raise nothing: their clients train
            again. Nor do updates with values that are not finite: their clients are left out.
    """
    paths = run.paths.round(number)
    try:
        run_server_job(
            run,
            kind="aggregate",
            folder=paths.aggregate_job,
            target=paths.root,
            done=paths.aggregate_record,
            round_number=number,
        )
    except FedllmError:
        if not number or not (leave_out_bad(run, paths) or reopen_if_damaged(run, paths)):
            raise
    return AggregateRecord.find(paths.aggregate_record)


def evaluate(run: Run, federation: Federation, number: int) -> None:
    """Make progress on a round's evaluation if one is due; no other step waits for it."""
    if not is_evaluated(run.config.evaluation, number, run.last_round):
        return
    paths = run.paths.round(number)
    if not paths.evaluation_record.exists() and not paths.evaluation_job(1).submission.exists():
        what = "the adapter" if number else "the base alone, to compare with"
        run.say(f"round {number}/{run.config.rounds}: scoring {what}")
    run_server_job(
        run,
        kind="evaluate",
        folder=paths.evaluation_job,
        target=paths.root,
        done=paths.evaluation_record,
        round_number=number,
        share=lambda: shares_of_evaluation(
            run.scheduler,
            federation,
            paths.evaluation,
            pieces_to_score(federation, state_round=number, targets_round=number),
        ),
    )


def shares_of_evaluation(
    scheduler: Scheduler,
    federation: Federation,
    paths: EvaluationPaths,
    pieces: Sequence[EvaluationPiece],
) -> Shares:
    """Return the tasks of an evaluation, and its pieces; parts that are there count as done.

    Processes that divide the base score all pieces together, one after the other.
    """
    if job_size("evaluate", engines_of(federation.config)).processes > 1:
        return ONE_TASK
    done = {path.stem for path in paths.part_files()}
    left = [piece for piece in pieces if paths.part(piece.number).stem not in done]
    return Shares(
        tasks=scorers_of(federation, left, scheduler.capacity), bundles=bundles_of(pieces)
    )


def redo_damaged_state(run: Run) -> None:
    """Check the newest server state against its record; aggregate a damaged one again.

    Raises:
        RunDirectoryError: the state is damaged and the updates it was made from are gone.
    """
    paths = run.paths.newest_state()
    if paths is None:
        return
    number, record = paths.number, AggregateRecord.read(paths.aggregate_record)
    _require_all(map(paths.earlier_state, record.earlier))
    problem = "missing"
    if paths.global_state.exists():
        if sha256_of(paths.global_state) == record.sha256:
            return
        problem = "not the file that aggregate.json describes"
    if number and not paths.updates.exists():
        raise RunDirectoryError(
            f"{paths.global_state}: {problem}, and the round's updates were pruned; "
            "restore the file"
        )
    run.lease.check()
    if paths.global_state.exists():
        paths.global_state.rename(backup_name(paths.global_state, "damaged"))
    # the record is moved last: if killed in between, this is done again
    if paths.aggregate_attempts.exists():
        paths.aggregate_attempts.rename(backup_name(paths.aggregate_attempts, "replaced"))
    paths.aggregate_record.rename(backup_name(paths.aggregate_record, "replaced"))
    run.say(f"{paths.global_state}: {problem}; aggregated again")


def _require_all(earlier_states: Iterable[Path]) -> None:
    for path in earlier_states:
        if not path.exists():
            raise RunDirectoryError(f"{path}: missing, the newest state refers to it; restore it")
