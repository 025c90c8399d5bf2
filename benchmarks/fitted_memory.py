"""Predicted and measured peak memory of workers, by rank: what `clients.ranks: fit` chooses from.

    python benchmarks/fitted_memory.py CONFIG --ranks 2 32 128 [--set KEY=VALUE]

For each rank a run of one tier takes a round, then a second one in new processes, whose workers
prepare nothing. The largest peak of the second round's clients stands beside the prediction from
the first of the ranks. The data should be as small as the question allows.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedllm.config.loading import read_config
from fedllm.methods.catalog import local_rule
from fedllm.planning.tiers import predicted_bytes
from fedllm.programs.memory_trial import measured_peak
from fedllm.reporting.tables import text_table
from fedllm.storage.kept_records import ClientsRecord
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import PreparedRecord

TIER = "all"
_FIXED = ["rounds=1", "evaluation.every=0", "scheduler.kind=local", "scheduler.workers=1"]


def measured_run(config: Path, root: Path, rank: int, changes: Sequence[str]) -> int:
    """Return the largest peak of the clients of a second round, in bytes."""
    fedllm = str(Path(sys.executable).with_name("fedllm"))
    given = [*changes, *_FIXED, f"clients.tiers={{{TIER}: {{ranks: {rank}}}}}"]
    words = [word for change in given for word in ("--set", change)]
    first = [fedllm, "run", str(config), "--run-dir", str(root), *words]
    for command in (first, [fedllm, "resume", str(root), "--set", "rounds=2"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    clients = ClientsRecord.read(RunPaths(root=root).round(2).clients).clients
    return max(client.peak_memory_bytes for client in clients)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, a row for each rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args(arguments)
    ranks = sorted(asked.ranks)
    with tempfile.TemporaryDirectory() as folder:
        roots = {rank: Path(folder) / f"rank-{rank}" for rank in ranks}
        measured = {r: measured_run(asked.config, root, r, asked.set) for r, root in roots.items()}
        run = RunPaths(root=roots[ranks[0]])
        config, prepared = read_config(run.config), PreparedRecord.read(run.prepared)
        peak = measured_peak(config, prepared, TIER, ranks[0])
    rule = local_rule(config.method.local, config.method.local_options)
    predicted = predicted_bytes(
        peak, ranks=ranks, modules=prepared.modules, optimizer=rule.optimizer
    )
    rows = [
        [
            str(rank),
            f"{predicted[rank] >> 20} MiB",
            f"{measured[rank] >> 20} MiB",
            f"{100 * (predicted[rank] / measured[rank] - 1):+.1f} %",
        ]
        for rank in ranks
    ]
    print(text_table("peak memory of a worker", ["rank", "predicted", "measured", "off by"], rows))


if __name__ == "__main__":
    main()
