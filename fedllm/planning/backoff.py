"""Pauses that double with every failure in a row; whoever waits has the clock."""

_MAX_DOUBLINGS = 60  # beyond it every limit is reached


class Backoff:
    """The pause before the next try.

    Args:
        first_seconds: the pause where nothing failed.
        max_seconds: no failure makes it longer.
    """

    def __init__(self, first_seconds: float, *, max_seconds: float) -> None:
        self._first, self._max = first_seconds, max_seconds
        self.failures = 0

    @property
    def seconds(self) -> float:
        """The pause as it is now."""
        return min(self._first * 2.0 ** min(self.failures, _MAX_DOUBLINGS), self._max)

    def fail(self) -> None:
        """Double the pause."""
        self.failures += 1

    def succeed(self) -> None:
        """Begin again with the first pause."""
        self.failures = 0
