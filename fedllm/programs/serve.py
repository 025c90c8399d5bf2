"""A resident process that runs one program after the other: `python -m fedllm.programs.serve`.

It reads a JSON line per job on stdin, `{"id": ..., "program": ..., "argv": [...], "log": path,
"environment": {...}}`, and answers `{"id": ..., "exit": n}` on stdout, after `{"ready": true}`. The
base model and the data stay in memory between jobs. It ends when stdin closes, and with its parent.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from fedllm.process.parent import end_with_parent


def main() -> int:
    """Serve until stdin closes."""
    end_with_parent()
    # the output of jobs goes to their logs: the answers need a descriptor of their own
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import fedllm.worker.worker  # noqa: F401 - the compute stack, before there is anything to do
    from fedllm.process.session import Session

    session = Session()
    # imported modules stay: the garbage collector need not visit them again
    gc.freeze()
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        if line.strip():
            message = json.loads(line)
            _answer(answers, {"id": message["id"], "exit": _serve(message, session)})
    return 0


def _serve(message: dict[str, Any], session: Any) -> int:
    from fedllm.programs.entry_points import run
    from fedllm.scheduling.environment import become_task

    log = Path(message["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    become_task(message["id"], message["log"])
    os.environ.update(message["environment"])
    try:
        return run(message["program"], message["argv"], session=session)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
