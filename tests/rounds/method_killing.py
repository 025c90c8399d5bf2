"""Kill the run of a method in the middle, resume it, and print its states and what clients keep.

Runs as a program: it stays single-threaded, so it can fork. `method_killing.py CONFIG FOLDER CASES`
prints one JSON line per case of CASES, a JSON list of options for `fedllm run`. Everything is real:
base, training, updates, aggregation. An audit hook kills the process with SIGKILL before it
publishes (by a rename) the first update of the second of two rounds.
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

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
KILL_AT = "0002/updates/"


def states(root: Path) -> list[str]:
    """Return the SHA-256 of each round's state."""
    run = RunPaths(root=root)
    records = (AggregateRecord.find(run.round(n).aggregate_record) for n in range(3))
    return [record.sha256 for record in records if record]


def kept(root: Path) -> dict[str, str]:
    """Return the SHA-256 of the tensors in every file that clients keep."""
    found = {}
    for file in sorted(RunPaths(root=root).client_stores.rglob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        found[str(file.relative_to(root))] = digest.hexdigest()
    return found


def kill_later(root: Path) -> None:
    """End the process before it publishes an update of the second round."""

    def kill(event: str, arguments: tuple[object, ...]) -> None:
        if event != "os.rename":
            return
        target = str(arguments[1])
        if target.startswith(str(root)) and KILL_AT in target:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)


def in_a_child(config: Path, root: Path, options: list[str], *, kill: bool = False) -> bool:
    """Run in a child; return whether it was killed."""
    child = os.fork()
    if not child:
        try:
            if kill:
                kill_later(root)
            with Path(os.devnull).open("w") as sink, redirect_stdout(sink):
                start(config, options, root)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, f"{options}: ended with {status}"
    return False


def main(config: Path, folder: Path, cases: list[list[str]]) -> None:
    """Compare an undisturbed run with one that is killed and resumed, case by case."""
    torch.set_num_threads(1)
    for module in LOADED:
        import_module(module)
    for number, options in enumerate(cases):
        whole, killed = folder / f"{number}-whole", folder / f"{number}-killed"
        in_a_child(config, whole, options)
        was_killed = in_a_child(config, killed, options, kill=True)
        early = states(killed)
        in_a_child(config, killed, options)
        found: dict[str, object] = {"killed": was_killed, "early": early, "whole": states(whole)}
        found |= {"resumed": states(killed), "kept": kept(whole), "kept_again": kept(killed)}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
