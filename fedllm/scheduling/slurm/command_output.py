"""Slurm's answers among what sites print beside them: banners, accounts, announcements. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Begins every line that squeue is asked for: what stands before it, and lines without it, are not
# squeue's.
MARK = "fedllm-answer:"

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SUBMITTED = re.compile(r"\bSubmitted batch job (\d+)(?: on cluster ([\w.-]+))?")
# a wrapper's number, which has to be all that it says; `id;cluster` of `--parsable`
_BARE = re.compile(r"(\d+)(?:;([\w.-]+))?")
_MOST_SAID = 200


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """A job that sbatch took; `cluster` is empty where it names none."""

    job: str
    cluster: str = ""


def submitted_job(said: str) -> SubmittedJob | None:
    """Return the job in what sbatch and its wrapper printed; None: the words do not decide it.

    sbatch's own sentence counts wherever it stands; a number only where nothing else was said, for
    beside other lines it may be a banner's. Sentences that name different jobs decide nothing.
    """
    plain = _COLOUR.sub("", said)
    found = set(_SUBMITTED.findall(plain))
    if not found and (alone := _BARE.fullmatch(plain.strip())):
        found = {alone.groups(default="")}
    if len(found) != 1:
        return None
    ((job, cluster),) = found
    return SubmittedJob(job=job, cluster=cluster)


def marked_lines(said: str) -> list[str]:
    """Return what follows the mark in the lines that have one."""
    parts = (line.partition(MARK) for line in said.splitlines())
    return [rest for _, mark, rest in parts if mark]


def rows_of(said: str, count: int) -> Iterator[list[str]]:
    """Return the fields of lines that have `count` of them, with `|` between or behind each."""
    for line in said.splitlines():
        found = [field.strip() for field in line.split("|")]
        if len(found) == count or (len(found) == count + 1 and not found[-1]):
            yield found[:count]


def excerpt(said: str) -> str:
    """Return what was said on one line, cut to what fits one."""
    line = "; ".join(filter(None, (part.strip() for part in said.splitlines()))) or "nothing"
    return line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]}..."
