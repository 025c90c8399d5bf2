"""Lines for the log of a task."""

import sys


def say(line: str) -> None:
    """Write a line to stderr, at once: what is said last matters most."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
