"""Coordinate a run: `python jobs/coordinator.py CONFIG [--run-dir DIR]`, or RUN to continue one.

Does the same as `fedllm run CONFIG` and `fedllm resume RUN`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from fedllm.cli.main import run


def main(argv: Sequence[str]) -> int:
    """Run the coordinator and return its exit code."""
    command = "resume" if argv and Path(argv[0]).is_dir() else "run"
    return run([command, *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
