"""Blocks of the cohort that are folded while others still train: a cache of the aggregation.

One small job at a time, of the aggregation's program and options, beside the workers. Whatever
becomes of it, the round goes on: what is not folded by then the aggregation folds itself.
"""

from collections import Counter
from collections.abc import Sequence

from fedllm.errors import ConfigError
from fedllm.planning.classes import job_options
from fedllm.rounds.run import Run
from fedllm.rounds.submissions import is_active, known_tasks, settle, submit_single
from fedllm.rounds.work import lacks_workers
from fedllm.scheduling.seam import SchedulerFull, SchedulerUnreachable, TaskState
from fedllm.storage.paths import JobPaths, RoundPaths, attempts_of
from fedllm.storage.records import CohortRecord, ErrorRecord, SubmissionRecord
from fedllm.storage.updates import Scan

_OPTION = "--fold"


def fold_ahead(run: Run, cohort: CohortRecord, scan: Scan) -> None:
    """Have blocks folded whose clients all have a valid update, where that is configured."""
    paths = run.paths.round(cohort.round)
    if not run.config.aggregation.fold_ahead or not _is_due(run, paths):
        return
    jobs = attempts_of(paths.fold_job)
    try:
        if not jobs or _was_of_use(run, paths, jobs[-1]):
            asked = {block for job in jobs for block in _blocks(run, job)}
            complete = complete_blocks(cohort, scan, run.config.aggregation.block_clients)
            _submit(run, paths, len(jobs) + 1, [b for b in complete if b not in asked])
    except (SchedulerFull, SchedulerUnreachable):
        # at the next look, where there is one
        return
    except ConfigError as error:
        # its plan was put aside, which ends it for this round
        run.say(f"round {cohort.round}: blocks cannot be folded ahead: {error}")


def end_folding(run: Run, number: int) -> None:
    """End a job that folds ahead of an aggregation which begins now."""
    for job in attempts_of(run.paths.round(number).fold_job)[-1:]:
        ids = known_tasks(run, job)
        states = run.scheduler.states(ids) if ids else {}
        # a process of a local run stays, with all that it has loaded
        ends = set(TaskState) - {TaskState.GONE}
        if run.config.scheduler.kind != "slurm":
            ends = {TaskState.WAITING}
        if left := [task for task, state in states.items() if state in ends]:
            run.lease.check()
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
    section = run.config.scheduler
    pause_seconds = section.query_seconds if section.kind == "slurm" else 0.0
    return run.watch.is_due(("fold", paths.root), pause_seconds)


def _was_of_use(run: Run, paths: RoundPaths, job: JobPaths) -> bool:
    """Say whether a job has ended and folded any block; what went wrong is told once."""
    if is_active(run, job, run.paths.logs(paths.number)):
        return False
    if not job.outcome.exists():
        outcome = settle(run, job)
        told = ErrorRecord.find(job.error)
        ended = [f"{task}: {ending}" for task, ending in outcome.endings.items()]
        if told or ended:
            run.say(
                f"round {paths.number}: folding blocks ahead failed "
                f"({told.message if told else '; '.join(ended)}); the aggregation folds them"
            )
    return any(paths.fold(block).exists() for block in _blocks(run, job))


def _blocks(run: Run, job: JobPaths) -> list[int]:
    command = run.read(SubmissionRecord, job.submission).command
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
