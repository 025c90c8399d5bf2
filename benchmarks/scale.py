"""Rounds of many clients on a simulated Slurm: what the coordinator costs, how full slots are.

    python benchmarks/scale.py --clients 1613,20000 --slots 8,64,256 --json

The planner, the dispatcher (`fedllm.rounds`), records, storage and the commands for Slurm are the
real ones. Simulated are the cluster (`simulated/cluster.py`: MaxArraySize, MaxSubmitJobs, `%N`,
time limits, scheduling delay) in virtual time, and the seconds that clients train: drawn (seeded)
from those of a small real run (`simulated/recorded.json`, made anew by `--record`).

Every client trains in both rounds; the second is the steady one, planned from what the first took.
Coordinator seconds are CPU time without what the simulation itself uses; the run directory lies in
memory (/dev/shm) where there is one, so that fsync costs little. Utilisation is the lower bound,
max(client seconds / slots, longest client), over the time from the round's first sbatch to its last
update, start-up of tasks included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.simulated.cluster import SimulatedSlurm
from benchmarks.simulated.federation import MODULES, RECORDED, Recorded
from benchmarks.simulated.figures import Figures, Moments, round_figures
from benchmarks.simulated.programs import Programs
from benchmarks.simulated.recording import record
from benchmarks.simulated.timeline import Timeline, virtual_clock
from fedllm.config.loading import validate
from fedllm.config.models import Config
from fedllm.rounds.coordinate import coordinate
from fedllm.rounds.opening import open_run
from fedllm.scheduling.slurm.executor import SlurmScheduler

ROUNDS = 2
# as sites have them: Slurm's default, and what one user may have in the queue
MAX_ARRAY_SIZE, MAX_SUBMIT_JOBS = 1001, 500


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate every pair of clients and slots, each in a process of its own."""
    asked = parsed(argv)
    if asked.record:
        record(RECORDED)
        return 0
    if asked.alone:
        (clients,), (slots,) = asked.clients, asked.slots
        print(json.dumps(asdict(simulate(clients, slots, seed=asked.seed, scratch=asked.scratch))))
        return 0
    found = []
    for slots in asked.slots:
        for clients in asked.clients:
            found.append(alone(clients, slots, asked))
            if not asked.json:
                print("\n".join(lines(found[-1], header=len(found) == 1)), flush=True)
    if asked.json:
        print(json.dumps({"runs": found}, indent=1))
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=numbers, default=[1613, 20000], help="1613,20000")
    parser.add_argument("--slots", type=numbers, default=[8, 64, 256], help="8,64,256")
    parser.add_argument("--seed", type=int, default=0, help="of sizes and durations (default: 0)")
    parser.add_argument("--scratch", type=Path, default=memory(), help="where runs go")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--record", action="store_true", help="make simulated/recorded.json anew")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def numbers(text: str) -> list[int]:
    """Return the numbers of `8,64`."""
    return [int(part) for part in text.split(",")]


def memory() -> Path | None:
    """Return a folder in memory where there is one: what fsync costs is not the subject."""
    folder = Path("/dev/shm")
    return folder if os.access(folder, os.W_OK) else None


def alone(clients: int, slots: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Simulate one pair in a new process: what another left in memory costs this one nothing."""
    words = [f"--clients={clients}", f"--slots={slots}", f"--seed={asked.seed}", "--alone"]
    if asked.scratch:
        words.append(f"--scratch={asked.scratch}")
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the simulation of {clients} clients on {slots} slots failed")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def configuration(
    cohort: int, slots: int, rounds: int = ROUNDS, storage: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """Return the configuration of a run in which `cohort` clients train in every round."""
    return validate(
        {
            "rounds": rounds,
            "storage": dict(storage),
            "lora": {"target_modules": [name.rpartition(".")[2] for name in MODULES]},
            "clients": {
                "tiers": {
                    "tiny": {"ranks": 2},
                    "small": {"ranks": 4},
                    "wide": {"ranks": {"attention": 4, "mlp": 16}},
                    "large": {"ranks": 16},
                },
                "cohort": {"count": cohort},
            },
            "training": {"batch_size": 4},
            "evaluation": {"clients": 8, "rows_per_client": 8, "complete_at_end": False},
            "scheduler": {"kind": "slurm", "max_parallel": slots},
        }
    )


def simulate(
    clients: int,
    slots: int,
    *,
    seed: int,
    scratch: Path | None,
    max_array_size: int = MAX_ARRAY_SIZE,
    max_submit_jobs: int = MAX_SUBMIT_JOBS,
    cohort: int | None = None,
    rounds: int = ROUNDS,
    storage: Mapping[str, Any] = MappingProxyType({}),
    look: Callable[[Path], object] = lambda _root: None,
) -> Figures:
    """Run all rounds in virtual time and return what they were like.

    Args:
        clients: how many there are.
        slots: workers at a time.
        seed: of sizes and durations.
        scratch: where the run directory goes.
        max_array_size: of the simulated Slurm.
        max_submit_jobs: of the simulated Slurm.
        cohort: how many train in a round; None: all.
        rounds: how many.
        storage: keys of this section.
        look: called with the finished run directory, before it is removed.
    """
    timeline = Timeline()
    programs = Programs(
        num_clients=clients, seed=seed, recorded=Recorded.read(), now=lambda: timeline.now
    )
    slurm = SimulatedSlurm(
        timeline=timeline,
        slots=slots,
        program=programs,
        max_array_size=max_array_size,
        max_submit_jobs=max_submit_jobs,
    )
    with tempfile.TemporaryDirectory(dir=scratch, prefix="fedllm-scale-") as folder:
        root = Path(folder) / "run"
        moments = Moments(slurm=slurm, root=root)
        programs.before_aggregation = moments.note
        begun = time.perf_counter()
        with virtual_clock(timeline):
            coordinate(
                open_run(
                    root,
                    configuration(cohort or clients, slots, rounds, storage),
                    make_scheduler=lambda _paths, config: SlurmScheduler(
                        section=config.scheduler, commands=slurm
                    ),
                    say=lambda line: print(line, file=sys.stderr),
                )
            )
        moments.look()
        look(root)
        return Figures(
            clients=clients,
            slots=slots,
            wall_seconds=time.perf_counter() - begun,
            commands=dict(Counter(name for _, name in slurm.issued)),
            most_files=moments.most_files,
            largest_folders=moments.largest_folders(5),
            rounds=[
                round_figures(number, slots=slots, moments=moments, trained=programs.of(number))
                for number in range(1, rounds + 1)
            ],
        )


COLUMNS = (
    ("clients", "{clients:>7}"),
    ("slots", "{slots:>5}"),
    ("round", "{round:>5}"),
    ("arrays", "{arrays:>6}"),
    ("tasks", "{tasks:>5}"),
    ("bundles", "{bundles:>7}"),
    ("limit min", "{requested_minutes:>9.0f}"),
    ("bound min", "{bound:>9.1f}"),
    ("took min", "{took:>8.1f}"),
    ("utilisation", "{utilisation:>11.3f}"),
    ("CPU s/1000", "{coordinator_seconds_per_1000_clients:>10.2f}"),
    ("commands", "{issued:>8}"),
    ("a minute", "{commands_per_minute:>8.2f}"),
)


def lines(found: dict[str, Any], *, header: bool) -> list[str]:
    """Return a run's rounds as lines of a table, and its largest folder."""
    told = ["  ".join(name for name, _ in COLUMNS)] if header else []
    for each in found["rounds"]:
        values = {
            **found,
            **each,
            "bound": each["lower_bound_seconds"] / 60,
            "took": each["makespan_seconds"] / 60,
            "issued": sum(each["commands"].values()),
        }
        told.append("  ".join(form.format(**values) for _, form in COLUMNS))
    folder, entries = next(iter(found["largest_folders"].items()))
    told.append(f"{'':7}  most files {found['most_files']}, most in a folder {entries} ({folder})")
    return told


if __name__ == "__main__":
    sys.exit(main())
