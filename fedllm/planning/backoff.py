"""Backoff: a pause that doubles with every failure in a row; the caller does the waiting."""

_MAX_DOUBLINGS = 60  # every maximum is reached before


class Backoff:
    """The pause before the next try.

    Args:
        first_seconds: the pause without failures.
        max_seconds: the longest pause.
    """

    def __init__(self, first_seconds: float, *, max_seconds: float) -> None:
        self._first, self._max = first_seconds, max_seconds
        self.failures = 0

    @property
    def seconds(self) -> float:
        """The current pause in seconds."""
        return min(self._first * 2.0 ** min(self.failures, _MAX_DOUBLINGS), self._max)

    def fail(self) -> None:
        """Double the pause."""
        self.failures += 1

    def succeed(self) -> None:
        """Reset the pause to `first_seconds`."""
        self.failures = 0
