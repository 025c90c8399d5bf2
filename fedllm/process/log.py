"""Lines for the log of a task."""

import sys


def say(line: str) -> None:
    """Write a line to stderr at once, so that the last line before a crash is not lost."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
