"""Kill the run of a method in the middle, resume it, and print the states of every round.

Runs as a program: it stays single-threaded, so it can fork. `method_killing.py CONFIG FOLDER CASES`
prints one JSON line per case of CASES, a JSON list of options for `fedllm run`. Everything is real:
base, training with checkpoints, updates, aggregation. An audit hook kills the process with SIGKILL
before a publication (a rename or a link), in the second of two rounds.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import torch

from fedllm.cli.execution import start
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord

# what a run takes seconds to import, once instead of in every child
LOADED = (
    "fedllm.packing.slots",
    "fedllm.programs.evaluate",
    "fedllm.programs.prepare",
    "fedllm.server.aggregate",
    "fedllm.training.trainers",
    "fedllm.worker.worker",
)
KILL_AT = 0.8  # of an undisturbed run's publications


def states(root: Path) -> list[str]:
    """Return the SHA-256 of each round's state."""
    run = RunPaths(root=root)
    records = (AggregateRecord.find(run.round(n).aggregate_record) for n in range(3))
    return [record.sha256 for record in records if record]


def counting(root: Path, kill_at: int | None) -> Callable[[], int]:
    """Count publications below `root`; end the process before the one of a number."""
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in {"os.rename", "os.link"} and str(root) in str(arguments[1]):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    return lambda: seen


def in_a_child(config: Path, root: Path, options: list[str], kill_at: int | None = None) -> int:
    """Run in a child; return how many publications it made, or -1 if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            seen = counting(root, kill_at)
            with Path(os.devnull).open("w") as sink, redirect_stdout(sink):
                start(config, options, root)
            os.write(writer, str(seen()).encode())
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as answer:
        said = answer.read()
    if os.WIFSIGNALED(status):
        return -1
    assert status == 0, f"{options}: ended with {status}"
    return int(said)


def main(config: Path, folder: Path, cases: list[list[str]]) -> None:
    """Compare an undisturbed run with one that is killed and resumed, case by case."""
    torch.set_num_threads(1)
    for module in LOADED:
        import_module(module)
    for number, options in enumerate(cases):
        whole, killed = folder / f"{number}-whole", folder / f"{number}-killed"
        count = in_a_child(config, whole, options)
        was_killed = in_a_child(config, killed, options, int(KILL_AT * count)) == -1
        early = states(killed)
        in_a_child(config, killed, options)
        found = {"killed": was_killed, "early": early, "whole": states(whole)}
        sys.stdout.write(json.dumps({**found, "resumed": states(killed)}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
