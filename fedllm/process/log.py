"""Lines for the log of a task."""

import contextlib
import sys

from fedllm.storage.trust.printable import printable


def say(line: str) -> None:
    """Write a line to stderr at once, so that the last line before a crash is not lost.

    A log that cannot be written, on a full disk for example, ends nothing: what the task publishes
    meets the same error and tells it.
    """
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{printable(line)}\n")
        sys.stderr.flush()
