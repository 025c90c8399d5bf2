"""How the kinds of scheduler differ for those who plan, wait and read; all else is in the seam."""

from dataclasses import dataclass

from fedllm.config.models import Config

_CLUSTERS = frozenset({"slurm"})


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What follows from the configured scheduler alone.

    Attributes:
        visibility_seconds: how long a file that cannot be read whole may still be on its way.
            Processes of one machine see each other's files at once; those of a cluster do not.
        query_seconds: the least time between two questions about tasks.
        tasks_start_anew: a task queues and loads what it needs, so a worker that is idle for a
            while is worth keeping; otherwise processes stay anyway.
        jobs_outlive_coordinator: jobs are a batch system's. They go on without whoever submitted
            them, other processes may ask about them, and a coordinator may be one.
    """

    visibility_seconds: float
    query_seconds: float
    tasks_start_anew: bool
    jobs_outlive_coordinator: bool


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
    )
