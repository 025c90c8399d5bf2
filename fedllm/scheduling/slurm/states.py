"""Slurm's words for the states of jobs (squeue(1), JOB STATE CODES); only here. Pure."""

from fedllm.scheduling.seam import EndReason, TaskState

_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_SUSPENDED = {"SUSPENDED", "STOPPED"}
_ENDED_WELL = "COMPLETED"
# the other final states, and why such a job ended
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
# the accounting shows such an end even while the job waits again
_PUT_BACK = {EndReason.PREEMPTED, EndReason.NODE_LOST}


def state_in_queue(word: str) -> TaskState:
    """Return the state of a job that squeue lists.

    A job that neither waits nor stands still nor ended counts as running: Slurm has several words
    for one that starts, runs, gets a signal or ends.
    """
    if has_ended(word):
        return TaskState.GONE
    if word in _SUSPENDED:
        return TaskState.SUSPENDED
    return TaskState.WAITING if word in _WAITING else TaskState.RUNNING


def has_ended(word: str) -> bool:
    """Say whether a job of this state has ended for good."""
    return word == _ENDED_WELL or word in END_REASONS


def stays_ended(word: str) -> bool:
    """Say whether no job of this final state is put back into the queue."""
    return has_ended(word) and END_REASONS.get(word) not in _PUT_BACK


def ended_well(word: str) -> bool:
    """Say whether a job of this final state succeeded."""
    return word == _ENDED_WELL
