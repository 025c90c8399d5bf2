"""The schedulers by name, and how each is made for a run."""

from collections.abc import Callable

from fedllm.config.models import Config
from fedllm.scheduling.inline import Execute, InlineScheduler
from fedllm.scheduling.local import LocalScheduler
from fedllm.scheduling.seam import Scheduler
from fedllm.scheduling.slurm.script import log_pattern
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import RunPaths


def _inline(config: Config, paths: RunPaths, execute: Execute) -> Scheduler:  # noqa: ARG001
    return InlineScheduler(execute=execute)


def _local(config: Config, paths: RunPaths, execute: Execute) -> Scheduler:  # noqa: ARG001
    return LocalScheduler(workers=config.scheduler.workers, log_folder=paths.all_logs)


def _slurm(config: Config, paths: RunPaths, execute: Execute) -> Scheduler:  # noqa: ARG001
    # imports submitit, which only runs on a cluster need
    from fedllm.scheduling.slurm.executor import SlurmScheduler

    return SlurmScheduler(section=config.scheduler)


SCHEDULERS: dict[str, Callable[[Config, RunPaths, Execute], Scheduler]] = {
    "inline": _inline,
    "local": _local,
    "slurm": _slurm,
}


def make_scheduler(config: Config, paths: RunPaths, execute: Execute) -> Scheduler:
    """Return the configured scheduler.

    Args:
        config: the run's configuration.
        paths: the run's directory.
        execute: runs a job's program in this process.
    """
    return SCHEDULERS[config.scheduler.kind](config, paths, execute)


def check_log_path(config: Config, paths: RunPaths) -> None:
    """Refuse a run directory whose logs the configured scheduler could not write.

    Raises:
        RunDirectoryError: the batch system cannot take its path.
    """
    if traits_of(config).jobs_outlive_coordinator:
        log_pattern(paths.all_logs, "")
