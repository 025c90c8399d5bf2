"""Differences between the kinds of scheduler that the rest of the code has to know."""

from dataclasses import dataclass
from pathlib import Path

from fedllm.config.models import Config, SchedulerSection, StorageSection
from fedllm.storage.paths import CachePaths, cache_of

_CLUSTERS = frozenset({"slurm"})


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties that follow from the kind of the configured scheduler.

    Attributes:
        visibility_seconds: how long a file that another process wrote may stay invisible or
            incomplete. Processes of one machine see each other's files at once; those of a
            cluster do not.
        query_seconds: the minimum time between two queries about tasks.
        tasks_start_anew: each task has to queue and load the base, so an idle worker is worth
            keeping for a while; otherwise processes stay anyway.
        jobs_outlive_coordinator: a batch system runs the jobs. They go on without the process
            that submitted them, other processes may ask about them, and the coordinator may be
            such a job itself.
        tasks_run_in_caller: the process that submits a task runs it, before it goes on.
    """

    visibility_seconds: float
    query_seconds: float
    tasks_start_anew: bool
    jobs_outlive_coordinator: bool
    tasks_run_in_caller: bool = False


def traits_of(config: Config) -> Traits:
    """Return the traits of a run's scheduler."""
    if config.scheduler.kind in _CLUSTERS:
        return Traits(
            visibility_seconds=config.storage.visibility_seconds,
            query_seconds=config.scheduler.query_seconds,
            tasks_start_anew=True,
            jobs_outlive_coordinator=True,
        )
    return Traits(
        visibility_seconds=0.0,
        query_seconds=0.0,
        tasks_start_anew=False,
        jobs_outlive_coordinator=False,
        tasks_run_in_caller=config.scheduler.kind == "inline",
    )


def cache_for(config: Config, run_root: Path) -> CachePaths:
    """Return the cache of a run."""
    return shared_cache(config.storage, config.scheduler, run_root)


def shared_cache(
    storage: StorageSection, scheduler: SchedulerSection, run_root: Path
) -> CachePaths:
    """Return the cache; the jobs of a cluster have it beside the runs, which all nodes share."""
    return cache_of(storage.cache, run_root, beside_runs=scheduler.kind in _CLUSTERS)
