"""Score a round's server state: `python jobs/evaluate.py RUN/rounds/NNNN`."""

import sys
from collections.abc import Sequence

from fedllm.process.session import Session
from fedllm.programs.entry_points import run


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    return run("evaluate", argv, session=Session())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
