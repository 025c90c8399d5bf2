"""One run made in two ways, in turn, on a development cluster that only the benchmark uses."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fedllm.config.loading import read_config
from fedllm.storage.paths import RoundPaths, RunPaths, shipped
from fedllm.storage.records import JobsRecord, RoundRecord
from tests.slurm.cluster import ENVIRONMENT, Cluster, is_installed, running, until

# two tasks at once, as on two cores; the development cluster answers at once and sees every file
COMMON = {
    "scheduler.kind": "slurm",
    "scheduler.max_parallel": 2,
    "scheduler.worker_minutes_min": 0.001,
    "scheduler.poll_seconds": 0.5,
    "scheduler.query_seconds": 1,
    "storage.visibility_seconds": 1,
    "evaluation.every": 0,
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to make the run: what it is called, and its keys."""

    name: str
    changes: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two ways to make the same run.

    `wall` says whose seconds count: those of the `training` phases (cohort to collection), or of
    all `rounds`, first cohort to last record.
    """

    title: str
    changes: Mapping[str, object]
    baseline: Way
    ours: Way
    wall: Literal["training", "rounds"]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A run that was made in one of the ways.

    `wall_seconds` are those that are compared, `starts` the training tasks that Slurm started,
    `client_seconds` what clients trained in all.
    """

    way: str
    wall_seconds: float
    starts: int
    client_trainings: int
    client_seconds: float
    states: list[str]


def compare(comparison: Comparison, asked: argparse.Namespace) -> int:
    """Make the run in both ways `asked.repeats` times, in turn, and print what came of it."""
    if not is_installed():
        sys.exit("Slurm is not installed: make slurm-packages (root)")
    pairs: list[tuple[Made, Made]] = []
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch, running(accounting=False) as up:
        for number in range(asked.repeats):
            folder = Path(scratch) / str(number)
            baseline = _made(comparison, comparison.baseline, folder / "baseline", up)
            pairs.append((baseline, _made(comparison, comparison.ours, folder / "ours", up)))
            assert pairs[-1][0].states == pairs[-1][1].states, "not the same run"
            if not asked.json:
                print(_line(pairs[-1]), flush=True)
    if asked.json:
        print(json.dumps(_figures(comparison, pairs), indent=1))
    else:
        print(_summary(comparison, pairs))
    return 0


def parsed(about: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line of a comparison."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--scratch", type=Path, help="where the runs go (default: the system's)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return parser.parse_args(argv)


def _made(comparison: Comparison, way: Way, root: Path, cluster: Cluster) -> Made:
    """Make the run in one way, on an empty cluster."""
    changes = {**COMMON, **comparison.changes, **way.changes}
    changes["storage.cache"] = root.parents[1] / "cache"
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    command = [str(Path(sys.executable).with_name("fedllm")), "run"]
    command += [str(shipped("configs/quickstart.yaml")), "--run-dir", str(root), *words]
    environment = {**ENVIRONMENT, "SLURM_CONF": str(cluster.conf), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"fedllm run exited {done.returncode}:\n{done.stdout}{done.stderr}"[-2000:])
    cluster.slurm("scancel", "--full", f"--user={os.getuid()}")
    until(lambda: not cluster.slurm("squeue", "-h"), seconds=60)
    return _measured(comparison, way, RunPaths(root=root))


def _measured(comparison: Comparison, way: Way, run: RunPaths) -> Made:
    rounds = [run.round(number) for number in range(1, read_config(run.config).rounds + 1)]
    if comparison.wall == "training":
        wall = sum(_moment(paths.collection) - _moment(paths.cohort) for paths in rounds)
    else:
        wall = _moment(rounds[-1].record) - _moment(rounds[0].cohort)
    records = [RoundRecord.read(paths.record) for paths in rounds]
    return Made(
        way=way.name,
        wall_seconds=wall,
        starts=sum(_starts(run, paths) for paths in rounds),
        client_trainings=sum(record.clients for record in records),
        client_seconds=sum(record.busy_seconds for record in records),
        states=[record.state_sha256 for record in records],
    )


def _moment(path: Path) -> float:
    """Return when a record was published."""
    return path.stat().st_mtime_ns / 1e9


def _starts(run: RunPaths, paths: RoundPaths) -> int:
    """Return how many tasks of a round's arrays began, by their logs."""
    attempts = [paths.attempt(number) for number in range(1, paths.last_attempt() + 1)]
    ids = [JobsRecord.read(attempt.jobs).ids.values() for attempt in attempts]
    tasks = {task for arrays in ids for array in arrays for task in array}
    logs = {path.name.removesuffix("_0_log.out") for path in run.all_logs.rglob("*_log.out")}
    return len(tasks & logs)


def _line(pair: tuple[Made, Made]) -> str:
    return "; ".join(
        f"{made.way}: {made.wall_seconds:.1f} s, {made.starts} starts" for made in pair
    )


def _ratios(pairs: Sequence[tuple[Made, Made]]) -> list[float]:
    return [baseline.wall_seconds / ours.wall_seconds for baseline, ours in pairs]


def _figures(comparison: Comparison, pairs: Sequence[tuple[Made, Made]]) -> dict[str, object]:
    ratios = _ratios(pairs)
    return {
        "comparison": comparison.title,
        "wall_ratio": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
        "start_ratio": statistics.median(base.starts / ours.starts for base, ours in pairs),
        "repeats": [[_plain(made) for made in pair] for pair in pairs],
    }


def _plain(made: Made) -> dict[str, object]:
    return {key: value for key, value in asdict(made).items() if key != "states"}


def _summary(comparison: Comparison, pairs: Sequence[tuple[Made, Made]]) -> str:
    ratios = _ratios(pairs)
    base, ours = pairs[-1]
    each = statistics.median(m.client_seconds / m.client_trainings for p in pairs for m in p)
    return (
        f"{comparison.title}, median of {len(pairs)}: {statistics.median(ratios):.2f}x the wall "
        f"time ({min(ratios):.2f}-{max(ratios):.2f}), {base.starts} against {ours.starts} starts; "
        f"{ours.client_trainings} trainings of {each:.2f} s"
    )
