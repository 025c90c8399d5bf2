"""Blocks of the cohort that are folded while others still train: a cache of the aggregation.

One small job at a time, of the aggregation's program and options, beside the workers. Whatever
becomes of it, the round goes on: what is not folded by then the aggregation folds itself.
"""

from collections import Counter
from collections.abc import Sequence

from fedllm.errors import ConfigError
from fedllm.planning.classes import job_options
from fedllm.rounds.run import Run
from fedllm.rounds.submissions import (
    find_unrecorded,
    is_active,
    is_mine,
    known_tasks,
    settle,
    submit_single,
    was_preempted,
)
from fedllm.rounds.work import lacks_workers
from fedllm.scheduling.seam import SchedulerFull, SchedulerUnreachable, TaskState
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import JobPaths, RoundPaths, attempts_of
from fedllm.storage.records import CohortRecord, ErrorRecord, OutcomeRecord, SubmissionRecord
from fedllm.storage.updates import Scan

_OPTION = "--fold"


def fold_ahead(run: Run, cohort: CohortRecord, scan: Scan) -> None:
    """Have blocks folded whose clients all have a valid update, where that is configured."""
    paths = run.paths.round(cohort.round)
    if not run.config.aggregation.fold_ahead or not _is_due(run, paths):
        return
    jobs = attempts_of(paths.fold_job)
    try:
        for last in jobs[-1:]:
            if is_active(run, last, run.paths.logs(paths.number)):
                return
            _close(run, paths, last)
        ended = [job for job in jobs if not _was_lost(run, job)]
        if not ended or _was_of_use(run, paths, ended[-1]):
            asked = {block for job in ended for block in _blocks(run, job)}
            complete = complete_blocks(cohort, scan, run.config.aggregation.block_clients)
            wanted = [b for b in complete if b not in asked and not paths.fold(b).exists()]
            _submit(run, paths, len(jobs) + 1, wanted)
    except (SchedulerFull, SchedulerUnreachable):
        # at the next look, where there is one
        return
    except ConfigError as error:
        # its plan was put aside, which ends it for this round
        run.say(f"round {cohort.round}: blocks cannot be folded ahead: {error}")


def end_folding(run: Run, number: int) -> None:
    """End a job that folds ahead of an aggregation which is about to begin."""
    paths = run.paths.round(number)
    if attempts_of(paths.aggregate_job):
        return
    for job in attempts_of(paths.fold_job)[-1:]:
        find_unrecorded(run, job)
        ids = known_tasks(run, job)
        states = run.scheduler.states(ids) if ids else {}
        # a process of a local run stays, with all that it has loaded
        ends = set(TaskState) - {TaskState.GONE}
        if not traits_of(run.config).tasks_start_anew:
            ends = {TaskState.WAITING}
        if left := [task for task, state in states.items() if state in ends]:
            # first why: should the round train once more, the job did not fail
            why = "the aggregation began"
            run.publish(OutcomeRecord(cancelled=dict.fromkeys(left, why)), job.outcome)
            run.scheduler.cancel(left)


def complete_blocks(cohort: CohortRecord, scan: Scan, block_clients: int) -> list[int]:
    """Return the blocks of the cohort all of whose clients have a valid update."""
    missing = Counter[int]()
    for place, client in enumerate(cohort.clients):
        found = scan.published.get(client.id)
        missing[place // block_clients] += found is None or found.record.status == "failed"
    return [block for block, count in missing.items() if not count]


def _is_due(run: Run, paths: RoundPaths) -> bool:
    if any(paths.fold_attempts.glob("*.refused-*")):
        return False
    return run.watch.is_due(("fold", paths.root), traits_of(run.config).query_seconds)


def _close(run: Run, paths: RoundPaths, job: JobPaths) -> None:
    """Record how a job that is over ended; what went wrong is told once."""
    if job.outcome.exists():
        return
    outcome = settle(run, job)
    told = ErrorRecord.find(job.error)
    ended = [f"{task}: {ending}" for task, ending in outcome.endings.items()]
    if (told or ended) and not _was_lost(run, job):
        run.say(
            f"round {paths.number}: folding blocks ahead failed "
            f"({told.message if told else '; '.join(ended)}); the aggregation folds them"
        )


def _was_lost(run: Run, job: JobPaths) -> bool:
    """Say whether the end of a job says nothing of its blocks: they may be asked for again.

    Preemption ended it, a coordinator did, or a person started the run again since.
    """
    outcome = settle(run, job)
    return not is_mine(run, job) or was_preempted(outcome) or bool(outcome.cancelled)


def _was_of_use(run: Run, paths: RoundPaths, job: JobPaths) -> bool:
    return any(paths.fold(block).exists() for block in _blocks(run, job))


def _blocks(run: Run, job: JobPaths) -> list[int]:
    command = run.seen.read(SubmissionRecord, job.submission).command
    return [int(block) for block in command[command.index(_OPTION) + 1].split(",")]


def _submit(run: Run, paths: RoundPaths, number: int, blocks: Sequence[int]) -> None:
    """Submit a job for some blocks, unless it would take a place that workers want."""
    if not blocks or any(lacks_workers(run, each) for each in attempts_of(paths.attempt)[-1:]):
        return
    # one place more stays for the aggregation
    room = run.scheduler.room(job_options(run.config.scheduler.sbatch, "aggregate"))
    if room is not None and room < 1:
        return
    submit_single(
        run,
        kind="aggregate",
        paths=paths.fold_job(number),
        step=f"fold-{number:02d}",
        arguments=[str(paths.root), _OPTION, ",".join(map(str, blocks))],
        round_number=paths.number,
    )
