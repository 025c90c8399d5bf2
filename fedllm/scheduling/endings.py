"""Why tasks ended, in words that hold for every scheduler."""

from fedllm.scheduling.seam import Ending, EndReason
from fedllm.scheduling.slurm.states import END_REASONS

_REASONS = {**{reason.value: reason for reason in EndReason}, **END_REASONS}


def reason_of(ending: Ending) -> EndReason:
    """Return why a task ended that did not end well.

    A record keeps the word of its scheduler: that of an `EndReason`, one of Slurm's, or what a
    process left behind (`exit 3`, `killed by signal 9`), which is a failure.
    """
    return _REASONS.get(ending.state, EndReason.FAILED)


def exit_status(ending: Ending) -> int | None:
    """Return the exit code of a task's program; None: a signal ended it, or nobody says."""
    code, _, signal = ending.exit_code.partition(":")
    if not code:
        code = ending.state.removeprefix("exit ")
    return int(code) if code.isdecimal() and signal in {"", "0"} else None
