"""A resident process that runs one program after the other: `python -m fedllm.programs.serve`.

It reads a JSON line per job on stdin, `{"id": ..., "program": ..., "argv": [...], "log": path,
"environment": {...}}`, and answers `{"id": ..., "exit": n}` on stdout, after `{"ready": true}`. The
base model and the data stay in memory between jobs. It ends when stdin closes, and with its parent.
"""

import gc
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from fedllm.process.parent import end_with_parent
from fedllm.storage.trust.regular_files import append_regular

_GO_ON = "--go-on"


def main(argv: Sequence[str]) -> int:
    """Serve until stdin closes."""
    end_with_parent()
    if argv[:1] == [_GO_ON]:
        answers, begun = _open_answers(int(argv[1])), [json.loads(argv[2])]
    else:
        # the output of jobs goes to their logs: the answers need a descriptor of their own
        answers, begun = _open_answers(os.dup(1)), []
        os.dup2(2, 1)
    import fedllm.worker.worker  # noqa: F401 - the compute stack, before there is anything to do
    from fedllm.process.session import Session

    session = Session()
    # imported modules stay: the garbage collector need not visit them again
    gc.freeze()
    for message in begun:
        _answer(answers, {"id": message["id"], "exit": _run(message, session, answers)})
    if not begun:
        _answer(answers, {"ready": True})
    for line in sys.stdin:
        if line.strip():
            message = json.loads(line)
            _take_up(message)
            _answer(answers, {"id": message["id"], "exit": _run(message, session, answers)})
    return 0


def _open_answers(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", encoding="utf-8")


def _take_up(message: dict[str, Any]) -> None:
    """Let this process's output and environment be those of a job."""
    from fedllm.scheduling.environment import become_task

    log = Path(message["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with append_regular(log) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    become_task(message["id"], message["log"])
    os.environ.update(message["environment"])


def _run(message: dict[str, Any], session: Any, answers: TextIO) -> int:
    """Run a job to its end; a new process goes on with it where this one is to begin anew."""
    from fedllm.process.renewal import ANEW, begin_anew
    from fedllm.process.signals import StopSignals
    from fedllm.programs.entry_points import run

    # other programs end by these signals
    notes = message["program"] == "client"
    try:
        with StopSignals() if notes else nullcontext() as signals:
            code = run(message["program"], message["argv"], session=session, signals=signals)
            if code != ANEW or signals is None:
                return code
            there = answers.fileno()
            arguments = ["-m", "fedllm.programs.serve", _GO_ON, str(there), json.dumps(message)]
            begin_anew(arguments, signals=signals, keep=[there])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
