"""Slurm's words for the states of jobs (squeue(1), JOB STATE CODES): the one authority. Pure."""

from fedllm.scheduling.seam import TaskState

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}


def state_in_queue(word: str) -> TaskState:
    """Return the state of a job that squeue lists unasked for ended ones.

    It has other words, too, while it starts, runs, is signalled or comes to its end.
    """
    return TaskState.WAITING if word in _WAITING else TaskState.RUNNING


def has_ended(word: str) -> bool:
    """Say whether a job of this state has ended and does not come back."""
    return word in _ENDED
