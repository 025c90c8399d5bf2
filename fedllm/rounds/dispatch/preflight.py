"""Preflight: check before a run's first job that the scheduler takes every kind of its jobs."""

from collections.abc import Iterator
from typing import Literal

from fedllm.planning.classes import classes_of, job_options, tier_options
from fedllm.planning.engines import engines_of, job_size
from fedllm.planning.sbatch_spelling import by_flag
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import Job, Option

_SINGLE: tuple[Literal["prepare", "aggregate", "evaluate"], ...] = (
    "prepare",
    "aggregate",
    "evaluate",
)


def check_jobs(run: Run) -> None:
    """Check one job of every kind with the scheduler; nothing is submitted.

    Raises:
        ConfigError: the scheduler would refuse a kind of job, or never start it; one line per
            problem.
        SchedulerUnreachable: the scheduler does not answer.
    """
    run.scheduler.check(list(_jobs(run)))


def _jobs(run: Run) -> Iterator[Job]:
    section = run.config.scheduler.sbatch
    logs = run.paths.logs(0)
    engines = engines_of(run.config)
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
