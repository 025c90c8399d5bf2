"""The peak memory of every process of a run, its workers' above all.

    python benchmarks/memory.py [CONFIG] [--set training.gradient_checkpointing=true]

runs `fedllm run CONFIG` (default: the quickstart) in a temporary run directory and samples `VmHWM`
of the command and of all processes below it (what a process holds, mapped files included) four
times a second.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measured.processes import family
from fedllm.storage.paths import shipped

_SECONDS = 0.25


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", default=shipped("configs/quickstart.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    changes = [word for change in asked.set for word in ("--set", change)]
    fedllm = str(Path(sys.executable).with_name("fedllm"))
    with tempfile.TemporaryDirectory() as folder:
        words = [fedllm, "run", str(asked.config), "--run-dir", f"{folder}/run", *changes]
        process = subprocess.Popen(words)
        peaks: dict[int, tuple[int, str]] = {}
        while process.poll() is None:
            for number in family(process.pid):
                peaks |= _peak(number)
            time.sleep(_SECONDS)
    for number, (mib, command) in peaks.items():
        print(f"{number:8} {mib:6} MiB  {command}")
    return process.returncode


def _peak(process: int) -> dict[int, tuple[int, str]]:
    folder = Path(f"/proc/{process}")
    try:
        lines = (folder / "status").read_text().splitlines()
        command = (folder / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return {}
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return {process: (found[0] >> 10, command[-70:])} if found else {}


if __name__ == "__main__":
    sys.exit(main())
