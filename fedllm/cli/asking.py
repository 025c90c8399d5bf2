"""Queries of a run's scheduler for commands that only read; answers are cached."""

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
from fedllm.storage.records import LeaseRecord, RunRecord
from fedllm.storage.trust.place import is_here


def scheduler_query(paths: RunPaths) -> AskScheduler | None:
    """Return the query of a run's scheduler; None where only its coordinator knows its tasks.

    The tasks that a copied directory names are not its own.
    """
    config = read_config(paths.config)
    if not traits_of(config).jobs_outlive_coordinator:
        return None
    if not is_here(RunRecord.read(paths.run).place, paths.root):
        return None
    scheduler = execution.make_scheduler(paths, config)
    return _SchedulerQuery(scheduler, config.scheduler.query_seconds)


class _SchedulerQuery:
    """Query of a scheduler, which itself queries Slurm at most once in `query_seconds`."""

    def __init__(self, scheduler: Scheduler, query_seconds: float) -> None:
        self._scheduler = scheduler
        self._query_seconds = query_seconds
        self._first_seen: dict[str, float] = {}

    def __call__(self, ids: Sequence[str]) -> SchedulerAnswers:
        """Return the states of tasks; a task submitted since the last answer has none."""
        now = time.monotonic()
        # the tasks of the first call were submitted before the first answer
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
    """Return the check whether a coordinator has ended; it caches Slurm's answer for a while."""
    known: dict[int, tuple[float, bool | None]] = {}
    query_seconds = read_config(paths.config).scheduler.query_seconds

    def gone(holder: LeaseRecord) -> bool | None:
        queried, answer = known.get(holder.number, (float("-inf"), None))
        now = time.monotonic()
        if holder.slurm_job is None or now - queried >= query_seconds:
            answer = holder_is_gone(holder)
            known[holder.number] = (now, answer)
        return answer

    return gone
