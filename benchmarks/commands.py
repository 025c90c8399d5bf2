"""CPU seconds of commands that look at large runs: plan, status, prune.

    python benchmarks/commands.py --repeats 5

Each command is a process of its own, as a user starts it; its CPU seconds are those of the process
and of all that it starts. `plan` has 1,613 embedded clients and plans for the second time (the
first plan prepares). `status` looks at a simulated run in which 20,000 clients trained in both
rounds, `prune` at one of 200 rounds of 80 of 1,613 clients that kept everything
(`benchmarks/scale.py` makes both). `prune --dry-run` finds what `prune` removes.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale import memory, simulate
from fedllm.storage.paths import RunPaths

_EVERYTHING = {"keep_states": 1000, "keep_logs": 1000}
_PLAN = """
model: {path: embedded}
data: {path: embedded, embedded_clients: 1613}
clients: {tiers: {small: {ranks: 2}, large: {ranks: 8}}, cohort: {count: 80}}
scheduler: {kind: local}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all commands and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each command (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    asked = parser.parse_args(argv)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=memory(), prefix="fedllm-commands-") as scratch:
        for name, seconds in measured(Path(scratch), asked.repeats):
            found.setdefault(name, []).append(seconds)
    if asked.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, values in found.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(
            f"{name:30} {statistics.median(values):6.2f} s of CPU ({spread}, {len(values)} times)"
        )
    return 0


def measured(scratch: Path, repeats: int) -> Iterator[tuple[str, float]]:
    """Yield the name of a command and the CPU seconds of one call."""
    file = scratch / "plan.yaml"
    file.write_text(_PLAN, encoding="utf-8")
    cpu_seconds("plan", file)
    for _ in range(repeats):
        yield "plan, 1,613 clients", cpu_seconds("plan", file)
    many = made(scratch / "many", clients=20_000, cohort=20_000, rounds=2)
    for _ in range(repeats):
        yield "status, 20,000 clients", cpu_seconds("status", many)
    long = made(scratch / "long", clients=1613, cohort=80, rounds=200, storage=_EVERYTHING)
    config = RunPaths(root=long).config
    kept = config.read_text(encoding="utf-8")
    config.write_text(re.sub(r"(keep_(states|logs)): 1000", r"\1: 2", kept), encoding="utf-8")
    for _ in range(repeats):
        yield "prune --dry-run, 200 rounds", cpu_seconds("prune", "--dry-run", long)
    yield "prune, 200 rounds", cpu_seconds("prune", long)


def made(root: Path, **given: Any) -> Path:
    """Simulate a run and keep its directory."""
    simulate(
        slots=64, seed=0, scratch=root.parent, look=lambda run: shutil.copytree(run, root), **given
    )
    return root


def cpu_seconds(*words: object) -> float:
    """Run a command of fedllm; return the CPU seconds of its processes."""
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("fedllm")), *map(str, words)],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"fedllm {' '.join(map(str, words))} failed")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
