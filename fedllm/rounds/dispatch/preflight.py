"""Preflight: check before a run's first job that the scheduler takes every kind of its jobs."""

from collections.abc import Iterator
from typing import Literal

from fedllm.config.models import Config
from fedllm.planning.classes import classes_of, job_options, tier_options
from fedllm.planning.engines import engines_of, job_size
from fedllm.planning.option_spelling import by_flag
from fedllm.scheduling.seam import Job, Option, Scheduler
from fedllm.storage.paths import RunPaths

_SINGLE: tuple[Literal["prepare", "aggregate", "evaluate"], ...] = (
    "prepare",
    "aggregate",
    "evaluate",
)


def check_jobs(scheduler: Scheduler, config: Config, paths: RunPaths) -> None:
    """Check one job of every kind with the scheduler; nothing is submitted.

    Raises:
        ConfigError: the scheduler would refuse a kind of job, or never start it; one line per
            problem.
        SchedulerUnreachable: the scheduler does not answer.
    """
    scheduler.check(list(_jobs(config, paths)))


def _jobs(config: Config, paths: RunPaths) -> Iterator[Job]:
    section, logs = config.scheduler.sbatch, paths.logs(0)
    engines = engines_of(config)
    for kind in _SINGLE:
        size = job_size(kind, engines)
        yield Job(
            name=f"fedllm-{kind}",
            program=kind,
            argv=(),
            log_folder=logs,
            processes_per_task=size.processes,
            nodes_per_task=size.nodes,
            options=job_options(section, kind),
        )
    for name in dict.fromkeys(classes_of(section, engines).values()):
        # without a configured time limit the plan sets one that fits the partition
        limit: dict[str, Option] = {"time": None}
        options = by_flag(tier_options(section, name))
        yield Job(
            name=f"fedllm-{name}",
            program="client",
            worker_class=name,
            argv=(),
            log_folder=logs,
            processes_per_task=engines[name].processes,
            nodes_per_task=engines[name].nodes,
            options=limit | options,
        )
