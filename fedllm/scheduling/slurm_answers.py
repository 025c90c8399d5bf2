"""Slurm's answers among what sites print beside them: banners, accounts, announcements. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Begins every line that squeue is asked for: what stands before it, and lines without it, are not
# squeue's.
MARK = "fedllm-answer:"

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SUBMITTED = re.compile(r"(?:sbatch: )?Submitted batch job (\d+)\b(?: on cluster ([\w.-]+))?.*")
# a wrapper's number alone; `id;cluster` of `--parsable`
_BARE = re.compile(r"(\d+)(?:;([\w.-]+))?")
_MOST_SAID = 200


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that sbatch took; `cluster` is empty where it names none."""

    job: str
    cluster: str = ""


def submitted(said: str) -> Submitted | None:
    """Return the job in what sbatch and its wrapper printed; None: the words do not decide it.

    Sentences of sbatch come before lines that hold a number alone. Where several name different
    jobs, one is a banner's, and which one cannot be told.
    """
    lines = [line.strip() for line in _COLOUR.sub("", said).splitlines()]
    for pattern in (_SUBMITTED, _BARE):
        found = {match.groups() for line in lines if (match := pattern.fullmatch(line))}
        if found:
            job, cluster = found.pop()
            return None if found else Submitted(job=job, cluster=cluster or "")
    return None


def marked(said: str) -> list[str]:
    """Return what follows the mark in the lines that have one."""
    parts = (line.partition(MARK) for line in said.splitlines())
    return [rest for _, mark, rest in parts if mark]


def fields(said: str, count: int) -> Iterator[list[str]]:
    """Return the fields of lines that have `count` of them, with `|` between or behind each."""
    for line in said.splitlines():
        found = [field.strip() for field in line.split("|")]
        if len(found) == count or (len(found) == count + 1 and not found[-1]):
            yield found[:count]


def quoted(said: str) -> str:
    """Return what was said on one line, cut to what fits one."""
    line = "; ".join(filter(None, (part.strip() for part in said.splitlines()))) or "nothing"
    return line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]}..."
