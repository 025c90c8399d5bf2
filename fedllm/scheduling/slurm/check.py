"""What Slurm would refuse, or take and never start, found before anything is submitted."""

import os
from collections.abc import Callable, Iterator, Sequence

from fedllm.config.models import SchedulerSection
from fedllm.planning.sbatch_options import time_minutes
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
    """Return a line for everything that is wrong with a job's options.

    sbatch tests them; a time limit that no partition allows passes there, unless the cluster has
    EnforcePartLimits, and the job would wait for ever.

    Args:
        flags: the job's.
        section: where their keys are.
        program: the job's.
        survey: what is known of the cluster for such a job.
        test: calls sbatch.

    Raises:
        SchedulerUnreachable: slurmctld does not answer.
    """
    yield from _elsewhere(survey)
    tested = flags
    most = survey.max_minutes
    if most is not None and _is_longer(flags.get("time"), most):
        key = key_of("time", flags["time"], sbatch=section.sbatch, program=program)
        yield (f"{key}: {flags['time']}: {_place(survey)} allows {most:g} minutes; ask for no more")
        tested = {**flags, "time": max(1, int(most))}
    # room in the queue comes and goes; the number of tasks is not under test
    words = ["sbatch", "--test-only", *words_of(tested), "--array=0-0", "--wrap=true"]
    try:
        test(words, tested)
    except CommandRefused as error:
        if says_no_room(str(error)) is False:
            told = refusal(str(error), tested, sbatch=section.sbatch, program=program)
            yield f"{told}{_known(str(error), survey)}"


def _elsewhere(found: Survey) -> Iterator[str]:
    """Yield what in the environment sends the user's own jobs to another cluster."""
    here = found.configuration.cluster if found.configuration else ""
    for variable in ("SBATCH_CLUSTERS", "SLURM_CLUSTERS"):
        named = os.environ.get(variable, "")
        if here and named and named != here:
            yield (
                f"{variable}: got {named}; fedllm submits to the cluster it is started on, {here}; "
                f"start it on a host of {named}, or unset {variable}"
            )


def _is_longer(time: object, most: float) -> bool:
    try:
        limit = time_minutes(time) if time is not None else None
    except ValueError:
        return False
    return limit is not None and limit > most


def _place(found: Survey) -> str:
    names = ",".join(partition.name for partition in found.partitions)
    qos = f" with QOS {found.place.qos}" if found.allowed.max_minutes is not None else ""
    return f"partition {names}{qos}"


def _known(said: str, found: Survey) -> str:
    """Return what there is instead of what sbatch does not know."""
    folded = said.lower()
    if "partition name" in folded and found.all_partitions:
        return f"; partitions here: {', '.join(sorted(found.all_partitions))}"
    if "invalid account" in folded and found.accounting:
        accounts = sorted({each.account for each in found.accounting.associations})
        return f"; accounts that you may use: {', '.join(accounts) or 'none'}"
    if "invalid qos" in folded and found.accounting:
        allowed = sorted({qos for each in found.accounting.associations for qos in each.qos})
        return f"; QOS that you may use: {', '.join(allowed) or 'none'}"
    return ""
