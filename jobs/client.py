"""Train clients: `python jobs/client.py ATTEMPT` is a worker of that attempt.

`--client C --scratch DIR` trains one client alone and compares its losses with the recorded ones.
"""

import sys
from collections.abc import Sequence

from fedllm.steps.programs import run
from fedllm.steps.session import Session


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    return run("client", argv, session=Session())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
