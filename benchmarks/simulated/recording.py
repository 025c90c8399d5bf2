"""Measure a small real run: seconds per token by tier, and the start-up of a worker."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedllm.storage.paths import RoundPaths, RunPaths, shipped
from fedllm.storage.records import CohortRecord, PreparedRecord, UpdateRecord
from fedllm.storage.updates import read_records, update_files

CLIENTS = 48
STARTS = 5


def record(target: Path) -> None:
    """Train one round of the quickstart with more clients and whole epochs; write what it took.

    Raises:
        subprocess.CalledProcessError: the run failed; what it said is on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        changes = {
            "rounds": 1,
            "data.embedded_clients": CLIENTS,
            "clients.cohort.count": CLIENTS,
            "training.max_steps": "null",
            "evaluation.every": 0,
        }
        entry = "import sys; from fedllm.cli.main import main; main()"
        words = ["run", str(shipped("configs/quickstart.yaml")), "--run-dir", str(root)]
        words += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        subprocess.run([sys.executable, "-c", entry, *words], check=True)
        parameters = PreparedRecord.read(RunPaths(root=root).prepared).model_parameters
        paths = RunPaths(root=root).round(1)
        tiers = {client.id: client.tier for client in CohortRecord.read(paths.cohort).clients}
        updates = [u for name in update_files(paths) for u in read_records(paths.updates / name)]
        rates: dict[str, list[float]] = {}
        for update in sorted(updates, key=lambda u: u.client):
            rate = round(1e6 * update.seconds / update.tokens, 1)
            rates.setdefault(tiers[update.client], []).append(rate)
        startups = [round(_startup(paths, update), 2) for update in updates[:STARTS]]
    found = {
        "made by": "python benchmarks/scale.py --record",
        "model_parameters": parameters,
        "microseconds_per_token": dict(sorted(rates.items())),
        "startup_seconds": startups,
    }
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    mean = statistics.mean(rate for each in rates.values() for rate in each)
    print(f"{target}: {mean:.0f} us per token, start-up {statistics.mean(startups):.1f} s")


def _startup(paths: RoundPaths, update: UpdateRecord) -> float:
    """Return what a process that trains one client takes beside training it."""
    attempt = paths.attempt(update.attempt).root
    with tempfile.TemporaryDirectory() as scratch:
        words = [str(shipped("jobs/client.py")), str(attempt), "--client", update.client]
        begun = time.monotonic()
        subprocess.run(
            [sys.executable, *words, "--scratch", scratch],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return time.monotonic() - begun - update.seconds
