"""Slurm's answers, picked out of the banners and announcements that sites print. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fedllm.scheduling.seam import SchedulerUnreachable

# Every line that we have squeue print begins with this. Text before it, and lines without it, come
# from elsewhere.
MARK = "fedllm-answer:"

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SUBMITTED = re.compile(r"\bSubmitted batch job (\d+)(?: on cluster ([\w.-]+))?")
# the bare number of a wrapper, with nothing else printed; `id;cluster` of `--parsable`
_BARE = re.compile(r"(\d+)(?:;([\w.-]+))?")
_MAX_EXCERPT = 200


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """A job that sbatch accepted; `cluster` is empty where sbatch names none."""

    job: str
    cluster: str = ""


def submitted_job(output: str) -> SubmittedJob | None:
    """Return the job that sbatch or its wrapper named in its output; None: it is not clear.

    sbatch's own sentence counts wherever it is. A number counts only if nothing else was printed:
    among other lines it may belong to a banner. Sentences that name different jobs do not count.
    """
    plain = _COLOUR.sub("", output)
    found = set(_SUBMITTED.findall(plain))
    if not found and (alone := _BARE.fullmatch(plain.strip())):
        found = {alone.groups(default="")}
    if len(found) != 1:
        return None
    ((job, cluster),) = found
    return SubmittedJob(job=job, cluster=cluster)


def marked_lines(output: str, *, columns: int = 1) -> list[str]:
    """Return the text behind the mark, of every line that has one.

    Raises:
        SchedulerUnreachable: a line ends too early, or has less than `columns` between `|`: the
            answer was cut, and lines may be missing.
    """
    *lines, unfinished = output.split("\n")
    parts = (line.rstrip("\r").partition(MARK) for line in lines)
    found = [rest for _, mark, rest in parts if mark]
    cut = [line for line in found if line.count("|") < columns - 1]
    if cut or MARK in unfinished:
        shown = excerpt(cut[0] if cut else unfinished.partition(MARK)[2])
        raise SchedulerUnreachable(f"squeue: its answer was cut at `{shown}`")
    return found


def rows_of(output: str, count: int) -> Iterator[list[str]]:
    """Yield the fields of each line that has `count` of them, with `|` between or behind each."""
    for line in output.splitlines():
        found = [field.strip() for field in line.split("|")]
        if len(found) == count or (len(found) == count + 1 and not found[-1]):
            yield found[:count]


def excerpt(output: str) -> str:
    """Return the output in one line of at most 200 characters."""
    line = "; ".join(filter(None, (part.strip() for part in output.splitlines()))) or "nothing"
    return line if len(line) <= _MAX_EXCERPT else f"{line[:_MAX_EXCERPT]}..."
