"""Slurm's words for the states of jobs (squeue(1), JOB STATE CODES): the one authority. Pure."""

from fedllm.scheduling.seam import EndReason, TaskState

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED_WELL = "COMPLETED"
# why a job of another final state ended
END_REASONS = {
    "BOOT_FAIL": EndReason.NODE_LOST,
    "CANCELLED": EndReason.CANCELLED,
    "DEADLINE": EndReason.TIME_LIMIT,
    "FAILED": EndReason.FAILED,
    "NODE_FAIL": EndReason.NODE_LOST,
    "OUT_OF_MEMORY": EndReason.OUT_OF_MEMORY,
    "PREEMPTED": EndReason.PREEMPTED,
    "TIMEOUT": EndReason.TIME_LIMIT,
}


def state_in_queue(word: str) -> TaskState:
    """Return the state of a job that squeue lists unasked for ended ones.

    It has other words, too, while it starts, runs, is signalled or comes to its end.
    """
    return TaskState.WAITING if word in _WAITING else TaskState.RUNNING


def has_ended(word: str) -> bool:
    """Say whether a job of this state has ended and does not come back."""
    return word == _ENDED_WELL or word in END_REASONS


def ended_well(word: str) -> bool:
    """Say whether a job of this final state did what it was to do."""
    return word == _ENDED_WELL
