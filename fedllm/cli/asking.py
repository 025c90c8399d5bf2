"""What a run's scheduler says, for those who only look: asked rarely, whoever looks how often."""

import os
import time
from collections.abc import Sequence

from fedllm.cli import execution
from fedllm.config.loading import read_config
from fedllm.errors import UserError
from fedllm.reporting.status.queue import AskScheduler, SchedulerAnswers
from fedllm.scheduling.seam import Scheduler, TaskState
from fedllm.scheduling.slurm.coordinator_job import holder_is_gone
from fedllm.scheduling.traits import traits_of
from fedllm.storage.lease import HolderIsGone
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import LeaseRecord


def scheduler_query(paths: RunPaths) -> AskScheduler | None:
    """Return what asks the scheduler of a run; None where it cannot answer to this process.

    Local tasks are known to their coordinator alone, and squeue is asked about one's own jobs.
    """
    config = read_config(paths.config)
    if not traits_of(config).jobs_outlive_coordinator or paths.run.stat().st_uid != os.getuid():
        return None
    scheduler = execution.make_scheduler(paths, config)
    return _Asking(scheduler, config.scheduler.query_seconds)


class _Asking:
    """Asks a scheduler, which itself asks Slurm once in `query_seconds` at most."""

    def __init__(self, scheduler: Scheduler, query_seconds: float) -> None:
        self._scheduler = scheduler
        self._query_seconds = query_seconds
        self._first_seen: dict[str, float] = {}

    def __call__(self, ids: Sequence[str]) -> SchedulerAnswers:
        """Return what is known of tasks; those that came since it was asked are unknown."""
        now = time.monotonic()
        # those of the first look were submitted before Slurm is asked
        seen = now if self._first_seen else float("-inf")
        for id_ in ids:
            self._first_seen.setdefault(id_, seen)
        try:
            states = self._scheduler.states(ids)
        except UserError as error:
            return SchedulerAnswers(problem=str(error))
        if ids and all(state is TaskState.UNKNOWN for state in states.values()):
            return SchedulerAnswers(problem="Slurm does not answer now")
        new = {id_ for id_ in ids if self._first_seen[id_] > now - self._query_seconds}
        return SchedulerAnswers(
            states={
                id_: state.value
                for id_, state in states.items()
                if not (id_ in new and state is TaskState.GONE)
            },
            reasons=self._scheduler.waiting_for(ids),
        )


def cached_holder_check(paths: RunPaths) -> HolderIsGone:
    """Return what says whether a coordinator ended, and asks Slurm again only after a while."""
    known: dict[int, tuple[float, bool | None]] = {}
    query_seconds = read_config(paths.config).scheduler.query_seconds

    def gone(holder: LeaseRecord) -> bool | None:
        asked, answer = known.get(holder.number, (float("-inf"), None))
        now = time.monotonic()
        if holder.slurm_job is None or now - asked >= query_seconds:
            answer = holder_is_gone(holder)
            known[holder.number] = (now, answer)
        return answer

    return gone
