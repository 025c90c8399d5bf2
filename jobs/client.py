"""Train clients: `python jobs/client.py ATTEMPT` is a worker of that attempt.

`--client C --scratch DIR` trains one client again, together with its group if it has one, and
compares the client's losses with the recorded ones.
"""

import sys
import time
from collections.abc import Sequence

from fedllm.process.signals import StopSignals


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code.

    Signals are noted before the slow imports: a warning may come at once.
    """
    with StopSignals() as signals:
        from fedllm.process.clock import process_seconds
        from fedllm.process.renewal import ANEW, begin_anew
        from fedllm.process.session import Session
        from fedllm.programs.entry_points import run

        began = time.monotonic() - process_seconds()
        code = run("client", argv, session=Session(), signals=signals, began=began)
        return code if code != ANEW else begin_anew(sys.orig_argv[1:], signals=signals)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
