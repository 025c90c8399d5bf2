"""Idle workers: they wait for the next attempt or round, with the base model still loaded."""

import time
from pathlib import Path

from fedllm.config.models import Config
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import AttemptPaths, RunPaths
from fedllm.storage.records import SubmissionRecord
from fedllm.worker.task import WorkerTask

# look often at first, since rounds may be short; then seldom, since many workers may look
_MIN_LOOK_SECONDS, _MAX_LOOK_SECONDS = 0.2, 5.0
_LOOKS_PER_WAIT = 10
# a signal does not end a sleep, so no sleep is long
_SLEEP_SECONDS = 1.0


def may_idle(config: Config) -> bool:
    """Return whether workers may wait idle: not local ones, which neither queue nor load again."""
    return traits_of(config).tasks_start_anew and config.scheduler.linger_minutes > 0


def next_attempt(
    task: WorkerTask, done: AttemptPaths, *, need_seconds: float
) -> AttemptPaths | None:
    """Wait for an attempt after `done` whose plan adopts this worker.

    The configuration is read at every look, since `scheduler.linger_minutes` may change.

    Args:
        task: the worker.
        done: the attempt in which it has no bundle left.
        need_seconds: the wait ends when the task has no more time left than this.

    Returns:
        The attempt; None if the wait is over: its minutes have passed, the run is done, or a
        signal came.
    """
    run, began = done.run, time.monotonic()
    while not task.signals.came:
        attempt = newest_attempt(run, done)
        if attempt is not None:
            if _adopts(attempt, task):
                return attempt
            done = attempt
        config, waited = task.session.config(run), time.monotonic() - began
        if not may_idle(config) or waited >= 60.0 * config.scheduler.linger_minutes:
            return None
        left = task.seconds_left()
        if run.round(config.rounds).record.exists() or (left is not None and left <= need_seconds):
            return None
        _sleep(task, waited / _LOOKS_PER_WAIT)
    return None


def newest_attempt(run: RunPaths, done: AttemptPaths) -> AttemptPaths | None:
    """Return the newest attempt of a run that has a plan; None if it is not later than `done`.

    The folders are listed, since NFS caches for a while that a file does not exist.
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


def _adopts(attempt: AttemptPaths, task: WorkerTask) -> bool:
    """Return whether the plan of an attempt adopts a worker.

    Only an adopted worker may train: the coordinator waits for no other one, and could give its
    bundles to a second worker.
    """
    return task.identity.task in SubmissionRecord.read(attempt.submission).adopted


def _numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []


def _sleep(task: WorkerTask, seconds: float) -> None:
    until = time.monotonic() + min(max(seconds, _MIN_LOOK_SECONDS), _MAX_LOOK_SECONDS)
    while not task.signals.came and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _SLEEP_SECONDS))
