"""Before a run's first job: would the scheduler take all the kinds of jobs that it is to submit?"""

from collections.abc import Iterator
from typing import Literal

from fedllm.planning.classes import classes_of, job_options, tier_options
from fedllm.planning.sbatch_options import by_flag
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import Job, Option

_SINGLE: tuple[Literal["prepare", "aggregate", "evaluate"], ...] = (
    "prepare",
    "aggregate",
    "evaluate",
)


def check_jobs(run: Run) -> None:
    """Ask the scheduler about one job of every kind; nothing is submitted.

    Raises:
        ConfigError: it would refuse some, or never start them; one line per problem.
        SchedulerUnreachable: it does not answer.
    """
    run.scheduler.check(list(_jobs(run)))


def _jobs(run: Run) -> Iterator[Job]:
    section = run.config.scheduler.sbatch
    logs = run.paths.logs(0)
    for kind in _SINGLE:
        options = job_options(section, kind)
        yield Job(name=f"fedllm-{kind}", program=kind, argv=(), log_folder=logs, options=options)
    for name in dict.fromkeys(classes_of(section, run.config.clients.tiers).values()):
        # without a configured one the time limit follows from the work, and fits the partition
        limit: dict[str, Option] = {"time": None}
        options = by_flag(tier_options(section, name))
        yield Job(
            name=f"fedllm-{name}",
            program="client",
            worker_class=name,
            argv=(),
            log_folder=logs,
            options=limit | options,
        )
