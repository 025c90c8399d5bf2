"""The schedulers there are."""

from collections.abc import Callable

from fedllm.config.models import Config
from fedllm.scheduling.inline import Execute, InlineScheduler
from fedllm.scheduling.local import LocalScheduler
from fedllm.scheduling.seam import Scheduler
from fedllm.storage.paths import RunPaths


def _inline(config: Config, paths: RunPaths, execute: Execute) -> Scheduler:  # noqa: ARG001
    return InlineScheduler(execute=execute)


def _local(config: Config, paths: RunPaths, execute: Execute) -> Scheduler:  # noqa: ARG001
    return LocalScheduler(workers=config.scheduler.workers, log_folder=paths.all_logs)


def _slurm(config: Config, paths: RunPaths, execute: Execute) -> Scheduler:  # noqa: ARG001
    # submitit is imported only where a cluster is used
    from fedllm.scheduling.slurm import SlurmScheduler

    return SlurmScheduler(section=config.scheduler)


SCHEDULERS: dict[str, Callable[[Config, RunPaths, Execute], Scheduler]] = {
    "inline": _inline,
    "local": _local,
    "slurm": _slurm,
}
