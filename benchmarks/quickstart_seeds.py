"""Does the quickstart learn, whatever the seed? Run it for seeds 0-4 and count.

Prints, per seed, the share of the clients that trained whose answer loss on their test rows is
lower after the last round than at round 0. Exits 1 where it is below 90 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.records import CollectionRecord, EvaluationRecord

_REQUIRED = 0.9


def losses(paths: RunPaths, round_number: int) -> dict[str, float]:
    """Return every scored client's answer loss as deployed after a round."""
    record = EvaluationRecord.read(paths.round(round_number).evaluation_record)
    return {client.client: client.as_deployed.loss for client in record.clients}


def trained_clients(paths: RunPaths, rounds: int) -> set[str]:
    """Return the clients whose update was used in any round."""
    collections = (
        CollectionRecord.read(paths.round(number).collection) for number in range(1, rounds + 1)
    )
    return {update.client for collection in collections for update in collection.updates}


def run_seed(seed: int, folder: Path) -> dict[str, object]:
    """Run the quickstart with one seed and count."""
    root = folder / f"seed-{seed}"
    command = [str(Path(sys.executable).with_name("fedllm")), "run"]
    command += [str(shipped("configs/quickstart.yaml")), "--run-dir", str(root)]
    subprocess.run([*command, "--set", f"seed={seed}"], check=True, stdout=subprocess.DEVNULL)
    paths = RunPaths(root=root)
    rounds = max(int(p.parent.name) for p in root.glob("rounds/*/round.json"))
    before, after = losses(paths, 0), losses(paths, rounds)
    clients = sorted(trained_clients(paths, rounds) & set(after))
    lower = sum(after[client] < before[client] for client in clients)
    return {
        "seed": seed,
        "clients": len(clients),
        "lower": lower,
        "share": lower / len(clients),
        "loss_before": sum(before[c] for c in clients) / len(clients),
        "loss_after": sum(after[c] for c in clients) / len(clients),
    }


def main() -> int:
    """Print a line per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_seed(seed, Path(folder)) for seed in range(arguments.seeds)]
    for row in rows:
        line = json.dumps(row) if arguments.json else "  ".join(f"{k} {v}" for k, v in row.items())
        sys.stdout.write(f"{line}\n")
    return 0 if all(float(str(row["share"])) >= _REQUIRED for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
