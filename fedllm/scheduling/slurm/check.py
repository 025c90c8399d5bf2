"""Problems of a job that Slurm would refuse, or accept and never start; nothing is submitted."""

import os
from collections.abc import Callable, Iterator, Sequence

from fedllm.config.models import SchedulerSection
from fedllm.planning.option_spelling import time_minutes
from fedllm.scheduling.slurm.commands import CommandRefused
from fedllm.scheduling.slurm.free_capacity import Survey
from fedllm.scheduling.slurm.sbatch_flags import Flags, key_of, refusal, says_no_room, words_of


def job_problems(
    flags: Flags,
    *,
    section: SchedulerSection,
    program: str,
    survey: Survey,
    test: Callable[[Sequence[str], Flags], None],
) -> Iterator[str]:
    """Yield a line for every problem with a job's options.

    sbatch tests them. Without EnforcePartLimits it accepts a time limit that no partition allows,
    and the job would wait for ever; so the time limit is checked here too.

    Args:
        flags: the job's flags.
        section: the scheduler's configuration, which holds their keys.
        program: the job's program.
        survey: what is known of the cluster for such a job.
        test: calls sbatch.

    Raises:
        SchedulerUnreachable: slurmctld does not answer.
    """
    yield from _other_cluster(survey)
    tested = flags
    max_minutes = survey.max_minutes
    if max_minutes is not None and _is_longer(flags.get("time"), max_minutes):
        key = key_of("time", flags["time"], sbatch=section.sbatch, program=program)
        yield (
            f"{key}: {flags['time']}: {_place(survey)} allows {max_minutes:g} minutes; "
            "ask for no more"
        )
        tested = {**flags, "time": max(1, int(max_minutes))}
    # one task: room in the queue comes and goes, so the number of tasks is not tested
    words = ["sbatch", "--test-only", *words_of(tested), "--array=0-0", "--wrap=true"]
    try:
        test(words, tested)
    except CommandRefused as error:
        if says_no_room(str(error)) is False:
            message = refusal(str(error), tested, sbatch=section.sbatch, program=program)
            yield f"{message}{_valid_names(str(error), survey)}"


def _other_cluster(survey: Survey) -> Iterator[str]:
    """Yield a line for each environment variable that sends jobs to another cluster."""
    here = survey.configuration.cluster if survey.configuration else ""
    for variable in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS"):
        named = os.environ.get(variable, "")
        if here and named and named != here:
            yield (
                f"{variable}: got {named}; fedllm submits to the cluster it is started on, {here}; "
                f"start it on a host of {named}, or unset {variable}"
            )


def _is_longer(time: object, max_minutes: float) -> bool:
    try:
        limit = time_minutes(time) if time is not None else None
    except ValueError:
        return False
    return limit is not None and limit > max_minutes


def _place(survey: Survey) -> str:
    names = ",".join(partition.name for partition in survey.partitions)
    qos = f" with QOS {survey.place.qos}" if survey.allowed.max_minutes is not None else ""
    return f"partition {names}{qos}"


def _valid_names(message: str, survey: Survey) -> str:
    """Return the valid names where sbatch's message says that one is unknown, else nothing."""
    folded = message.lower()
    if "partition name" in folded and survey.all_partitions:
        return f"; partitions here: {', '.join(sorted(survey.all_partitions))}"
    if "invalid account" in folded and survey.accounting:
        accounts = sorted({own.account for own in survey.accounting.associations})
        return f"; accounts that you may use: {', '.join(accounts) or 'none'}"
    if "invalid qos" in folded and survey.accounting:
        allowed = sorted({qos for own in survey.accounting.associations for qos in own.qos})
        return f"; QOS that you may use: {', '.join(allowed) or 'none'}"
    return ""
