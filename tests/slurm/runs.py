"""Runs of the tiny federation on a development cluster, and what they leave."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import ClaimRecord, CohortRecord, RunRecord, UpdateRecord
from fedllm.storage.updates import read_records, update_files
from tests.cli.commands import in_process
from tests.slurm.cluster import Cluster, until
from tests.tiny import Tiny

# What fits a cluster of one machine: answers in seconds, files seen by all nodes at once.
ON_CLUSTER = (
    "scheduler.kind=slurm",
    "scheduler.max_parallel=2",
    "scheduler.clients_per_bundle=1",
    "scheduler.poll_seconds=0.2",
    "scheduler.query_seconds=0.5",
    "scheduler.worker_minutes_min=0.000001",
    "storage.visibility_seconds=1",
)
HELD = "scheduler.sbatch.client.hold=true"
PATIENCE_SECONDS = 300.0


def settings(*changes: str) -> list[str]:
    """Return the words that change keys."""
    return [word for change in changes for word in ("--set", change)]


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run whose first round was made inline: its second can be made on a cluster."""

    tiny: Tiny
    folder: Path
    inline: tuple[str, ...] = ("evaluation.every=0", "scheduler.kind=inline")

    def run(self, name: str, *, rounds: int) -> Path:
        """Run inline to a number of rounds; return the run directory."""
        root = self.folder / name
        words = settings(*self.inline, f"rounds={rounds}")
        done = in_process("run", self.tiny.config, "--run-dir", root, *words)
        assert done.returncode == 0, done.stderr
        return root

    def words(self, root: Path, *changes: str) -> list[object]:
        """Return the words of `fedllm` that make the second round on a cluster."""
        return ["resume", root, *settings("rounds=2", *ON_CLUSTER, *changes)]


def arrays(cluster: Cluster, root: Path, name: str = "") -> dict[str, set[str]]:
    """Return the arrays of a run that Slurm knows of, ended ones too: name -> ids.

    Those of a step if `name` is its beginning, such as `r0002-a01-` or `r0002-aggregate`.
    """
    found: dict[str, set[str]] = {}
    run_id = RunRecord.read(RunPaths(root=root).run).run_id
    pattern = re.compile(rf"r(\d+)-(\w+)-fedllm-{run_id}-(.*)")
    for line in cluster.slurm("squeue", "-h", "-t", "all", "-o", "%F|%j").splitlines():
        id_, _, listed = line.partition("|")
        matched = pattern.fullmatch(listed)
        if matched is None:
            continue
        step = "" if matched[2] == "train" else f"{matched[2]}-"
        if f"r{int(matched[1]):04d}-{step}{matched[3]}".startswith(name):
            found.setdefault(listed, set()).add(id_)
    return found


def state_of(cluster: Cluster, job: str) -> str:
    """Return the states of a job's tasks, ended or not, without repetition."""
    said = cluster.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")
    return " ".join(sorted(set(said.split())))


def published(paths: RoundPaths) -> list[UpdateRecord]:
    """Return the records of all updates of a round: a client that trained twice has two."""
    return [r for name in update_files(paths) for r in read_records(paths.updates / name)]


def each_trained_once(paths: RoundPaths) -> bool:
    """Say whether every client of the cohort has one update."""
    cohort = CohortRecord.read(paths.cohort)
    return sorted(r.client for r in published(paths)) == sorted(c.id for c in cohort.clients)


def claims(attempt: AttemptPaths) -> list[ClaimRecord]:
    """Return what tasks of an attempt have claimed."""
    return [ClaimRecord.read(path) for path in sorted(attempt.claims.glob("[0-9]*.json"))]


def stopped_workers(attempt: AttemptPaths, count: int) -> list[ClaimRecord]:
    """Stop workers of an attempt at their first claim: they have yet to load the base."""
    held: dict[str, ClaimRecord] = {}

    def are_held() -> bool:
        for claim in claims(attempt):
            if claim.task not in held and len(held) < count:
                python_of(claim.task).suspend()
                held[claim.task] = claim
        return len(held) == count

    until(are_held, seconds=PATIENCE_SECONDS)
    return list(held.values())


def python_of(task: str) -> psutil.Process:
    """Return the process of a task that trains: neither its batch script nor its srun."""
    found = [
        process
        for process in psutil.process_iter()
        if _words(process)[:1] == [sys.executable] and _environment(process) == task
    ]
    assert len(found) == 1, f"{task}: {found}"
    return found[0]


def _words(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _environment(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("FEDLLM_TASK")
    except psutil.Error:
        return None
