"""Patience with file servers: what they refuse for a while is asked again, with growing pauses."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fedllm.errors import Incomplete, StorageFull, UserError
from fedllm.planning.backoff import Backoff
from fedllm.storage.publishing.permissions import denied
from fedllm.storage.publishing.publish import full_storage, storage_trouble

_LONGEST_PAUSE_SECONDS = 30.0

Answer = TypeVar("Answer")


@dataclass(kw_only=True)
class Patience:
    """Patience with the file system of a run, for so many `seconds` without a success.

    Attributes:
        seconds: how long one trouble may last.
        say: logs one line.
        wait: sleeps for so many seconds.
        now: returns the seconds of a clock that never goes back.
    """

    seconds: float
    say: Callable[[str], None]
    wait: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    _since: float | None = None
    _pause: Backoff = field(
        default_factory=lambda: Backoff(0.5, max_seconds=_LONGEST_PAUSE_SECONDS)
    )

    def outlast(self, error: Exception) -> None:
        """Wait before the caller's next try.

        Raises:
            Incomplete: the trouble lasts too long.
            StorageFull: no space or quota is left.
            UserError: the mode of a file keeps this user from reading it.
            Exception: `error` itself, if it is no trouble of the file system.
        """
        if full := full_storage(error):
            if isinstance(error, StorageFull):
                raise error
            raise StorageFull(f"{full}; make space, then resume the run") from error
        if problem := denied(error):
            raise UserError(problem) from error
        trouble = storage_trouble(error)
        if trouble is None:
            raise error
        now = self.now()
        self._since = now if self._since is None else self._since
        left = self._since + self.seconds - now
        if left <= 0:
            raise Incomplete(
                f"{trouble}, for {now - self._since:.0f} s; repair the disk or file server, then "
                "resume the run"
            ) from error
        pause = min(self._pause.seconds, left)
        self.say(f"{trouble}; trying again in {pause:.1f} s")
        self.wait(pause)
        self._pause.fail()

    def succeed(self) -> None:
        """Note that the file system answers again."""
        self._since = None
        self._pause.succeed()

    def retry(self, call: Callable[[], Answer]) -> Answer:
        """Call until the file system answers; return the answer. The errors are of `outlast`."""
        while True:
            try:
                answer = call()
            except Exception as error:
                self.outlast(error)
            else:
                self.succeed()
                return answer
