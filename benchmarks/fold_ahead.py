"""Time the aggregation after a round's last update, with `aggregation.fold_ahead` and without.

    python benchmarks/fold_ahead.py DIR --layers 2

80 clients of some layers of a 1.3B LLaMA publish; all but the last client's block were folded
before, where that is asked for. Then the round is collected and a fresh process aggregates it, its
start included. Both ways take turns; the state must be the same.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.inputs.adapters import MODELS
from benchmarks.measured import whole_round
from fedllm.config.loading import dump_config, override_config, read_config
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.publish import publish_bytes
from fedllm.storage.records import AggregateRecord, CollectionRecord

_AGGREGATE = """
import resource, sys
from pathlib import Path
from fedllm.steps.aggregate import aggregate_round
from fedllm.storage.paths import RoundPaths
aggregate_round(RoundPaths(root=Path(sys.argv[1])))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""
_FOLD = """
import sys
from pathlib import Path
from fedllm.steps.aggregate import fold_ahead
from fedllm.storage.paths import RoundPaths
print(fold_ahead(RoundPaths(root=Path(sys.argv[1])), [0, 1]))
"""


def _ran(program: str, paths: RoundPaths) -> tuple[str, float]:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(paths.root)], check=True, stdout=subprocess.PIPE
    )
    return done.stdout.decode().strip(), time.perf_counter() - begun


def _made(asked: argparse.Namespace) -> tuple[RunPaths, CollectionRecord]:
    """Write the round once, unless it is there, and fold all blocks but the last."""
    model = f"llama-1.3b of {asked.layers} layers"
    MODELS[model] = (asked.layers, *MODELS["llama-1.3b"][1:])
    made = argparse.Namespace(
        shape=model,
        ranks="8,30,30+200,200",
        clients=80,
        device="cpu",
        threads=2,
        block_clients=32,
        tolerance=1e-4,
        exact=False,
    )
    run = RunPaths(root=asked.folder.resolve())
    paths = run.round(1)
    if not paths.collection.exists():
        whole_round._write(made, run, whole_round._config(made))
    return run, CollectionRecord.read(paths.collection)


def main() -> None:
    """Print the seconds of each repeat, both ways."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    run, collection = _made(asked)
    paths = run.round(1)
    config = read_config(run.config)
    if not paths.fold(0).exists():
        paths.collection.unlink()
        print("folded", *_ran(_FOLD, paths), flush=True)
        collection.publish(paths.collection)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(asked.repeats):
        states = set()
        for way in (False, True) if repeat % 2 else (True, False):
            changed = override_config(config, [f"aggregation.fold_ahead={str(way).lower()}"])
            publish_bytes(run.config, dump_config(changed).encode())
            paths.aggregate_record.unlink(missing_ok=True)
            cpu, wall = _ran(_AGGREGATE, paths)
            record = AggregateRecord.read(paths.aggregate_record)
            states.add(record.sha256)
            seconds[way].append(wall)
            stages = {stage: round(each, 1) for stage, each in record.stages.items()}
            print(f"fold_ahead {way}: {wall:.1f} s, CPU {float(cpu):.1f} s, {stages}", flush=True)
            print(f"  found folded: {record.folded_ahead}", flush=True)
        assert len(states) == 1, states
    publish_bytes(run.config, dump_config(config).encode())
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    print(f"medians {medians}, ratio {medians[True] / medians[False]:.2f}")


if __name__ == "__main__":
    main()
