"""Reasons why tasks failed, in the same words for every scheduler."""

from fedllm.scheduling.seam import Ending, EndReason
from fedllm.scheduling.slurm.states import END_REASONS

_REASONS = {**{reason.value: reason for reason in EndReason}, **END_REASONS}


def reason_of(ending: Ending) -> EndReason:
    """Return why a task failed.

    A record keeps its scheduler's word for the end: a value of `EndReason`, a state of Slurm, or
    the exit of a process (`exit 3`, `killed by signal 9`). The last kind is a plain failure.
    """
    return _REASONS.get(ending.state, EndReason.FAILED)


def exit_status(ending: Ending) -> int | None:
    """Return the exit code of a task's program; None: a signal ended it, or the code is unknown."""
    code, _, signal = ending.exit_code.partition(":")
    if not code:
        code = ending.state.removeprefix("exit ")
    return int(code) if code.isdecimal() and signal in {"", "0"} else None
