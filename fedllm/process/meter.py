"""Meter of a job's progress: lines of its log, and a record that the coordinator shows."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from fedllm.errors import FedllmError
from fedllm.process.log import say
from fedllm.storage.kept_records import ProgressRecord

_RECORD_SECONDS = 5.0
_LINE_SECONDS = 10.0
# work that gets no line
_SHORT_SECONDS = 1.0


class Meter:
    """Meter of what a job has done.

    Args:
        file: where the record is written, at most every 5 seconds; None: nowhere.
        say_line: prints a line of progress, at most every 10 seconds.
        now: a clock in seconds.
    """

    def __init__(
        self,
        file: Path | None = None,
        say_line: Callable[[str], None] = say,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._say = say_line
        self._now = now
        self._what = ""
        self._began = self._said = self._written = self._last = now()

    def count(self, what: str, done: int, total: int) -> None:
        """Note how many things are done, in the record and in a line."""
        is_new, is_last = what != self._what, done >= total
        record, now = self.noted(what, done, total), self._last
        if self._file and (is_new or is_last or now - self._written >= _RECORD_SECONDS):
            self._written = now
            # a full disk stops the job where it writes its result, not here
            with contextlib.suppress(FedllmError, OSError):
                record.publish(self._file)
        is_short = record.seconds < _SHORT_SECONDS
        if (is_last and not is_short) or now - self._said >= _LINE_SECONDS:
            self._said = now
            self._say(record.text)

    def noted(self, what: str, done: int, total: int) -> ProgressRecord:
        """Return the progress; the time of a kind counts from the call before its first one."""
        now = self._now()
        if what != self._what:
            self._what, self._began = what, self._last
        self._last = now
        return ProgressRecord(what=what, done=done, total=total, seconds=now - self._began)
