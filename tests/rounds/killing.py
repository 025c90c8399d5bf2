"""Kill a run before each of its publications in turn, resume it, and print the results.

Runs as a program: it stays single-threaded, so it can fork. `killing.py FOLDER` prints one JSON
line per kill. A publication is a rename or a link; an audit hook kills the process with SIGKILL
before the n-th, which leaves exactly what a power cut there would leave.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from fedllm.storage.updates import read_update
from tests.rounds.simulation import Simulation, complete, states


def killed_before(root: Path, publication: int) -> bool:
    """Run in a child that is killed before its n-th publication; return whether it got that far."""
    child = os.fork()
    if not child:
        seen = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in {"os.rename", "os.link"} and str(root) in str(arguments[1]):
                seen += 1
                if seen == publication:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        complete(root, Simulation(log=lambda _line: None))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def resumed(root: Path) -> dict[str, object]:
    """Resume in a child; return what it found and what it left."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        published = [
            (update.record.round, update.record.client)
            for path in root.glob("rounds/*/updates/[0-9]*.safetensors")
            for update in read_update(path)
        ]
        simulation = Simulation(log=lambda _line: None)
        complete(root, simulation)
        answer = {
            "states": states(root),
            "trained": simulation.trained,
            "published": published,
        }
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"resume ended with {status}"
    with os.fdopen(reader) as answers:
        found: dict[str, object] = json.loads(answers.read())
    return found


def main(folder: Path) -> None:
    """Kill runs before publication 1, 2, ... until one survives."""
    torch.set_num_threads(1)
    number = 1
    while killed_before(folder / str(number), number):
        sys.stdout.write(json.dumps({"kill": number, **resumed(folder / str(number))}) + "\n")
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
