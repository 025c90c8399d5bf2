"""A worker without work stays for the next attempt or round, with all that it has loaded."""

import time
from pathlib import Path

from fedllm.config.models import Config
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import AttemptPaths, RunPaths
from fedllm.storage.records import SubmissionRecord
from fedllm.worker.task import WorkerTask

# often at first: rounds may be short; then cheap, whatever the number of workers
_SHORTEST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.2, 5.0
_LOOKS_PER_WAIT = 10
# a signal does not end a sleep
_SLEEP_SECONDS = 1.0


def may_idle(config: Config) -> bool:
    """Say whether workers stay: only those that queue and load anew, which local ones do not."""
    return traits_of(config).tasks_start_anew and config.scheduler.linger_minutes > 0


def next_attempt(
    task: WorkerTask, done: AttemptPaths, *, need_seconds: float
) -> AttemptPaths | None:
    """Wait for an attempt after `done` that takes this worker over.

    The configuration is read at every look: `scheduler.linger_minutes` may change.

    Args:
        task: the worker.
        done: the attempt, in which nothing is left to do.
        need_seconds: with less time left there is nothing to wait for.

    Returns:
        The attempt; None when the wait is over: its minutes have passed, the run is done, a
        signal came.
    """
    run, began = done.run, time.monotonic()
    while not task.signals.came:
        attempt = newest_attempt(run, done)
        if attempt is not None:
            if _counts_on(attempt, task):
                return attempt
            done = attempt
        config, waited = task.session.config(run.config), time.monotonic() - began
        if not may_idle(config) or waited >= 60.0 * config.scheduler.linger_minutes:
            return None
        left = task.seconds_left()
        if run.round(config.rounds).record.exists() or (left is not None and left <= need_seconds):
            return None
        _sleep(task, waited / _LOOKS_PER_WAIT)
    return None


def newest_attempt(run: RunPaths, done: AttemptPaths) -> AttemptPaths | None:
    """Return the newest training attempt of a run with a plan, if it came after `done`.

    Folders are listed: NFS remembers for a while that a file was not there.
    """
    first = done.round.number
    for number in reversed(_numbers(run.rounds)):
        if number < first:
            break
        paths = run.round(number)
        for last in reversed(_numbers(paths.attempts)):
            attempt = paths.attempt(last)
            if (number, last) <= (first, done.number):
                return None
            if attempt.submission.exists():
                return attempt
    return None


def _counts_on(attempt: AttemptPaths, task: WorkerTask) -> bool:
    """Say whether the coordinator took a worker over into an attempt.

    Only then does it wait for this worker: nobody else may train what another could be given.
    """
    return task.identity.task in SubmissionRecord.read(attempt.submission).adopted


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    except FileNotFoundError:
        return []


def _sleep(task: WorkerTask, seconds: float) -> None:
    until = time.monotonic() + min(max(seconds, _SHORTEST_LOOK_SECONDS), _LONGEST_LOOK_SECONDS)
    while not task.signals.came and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _SLEEP_SECONDS))
