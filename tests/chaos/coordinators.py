"""The coordinator of a run as a user has it: a process of a login node, a job, or a chain."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.scheduling.slurm.states import has_ended
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RunRecord
from tests.cli.commands import FEDLLM
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import settings


@dataclass(frozen=True, kw_only=True)
class Command:
    """What begins a run and goes on with it."""

    config: Path
    changes: Sequence[str]
    root: Path
    cluster: Cluster
    environment: Mapping[str, str]
    log: Path

    def words(self, verb: str, rounds: int, *changes: str) -> list[str]:
        """Return the command line."""
        run = [verb, str(self.config), "--run-dir", str(self.root)]
        return [FEDLLM, *run, *settings(*self.changes, *changes, f"rounds={rounds}")]


@dataclass(kw_only=True)
class ProcessCoordinator:
    """`fedllm run`, started again after each death."""

    command: Command
    rounds: int
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Begin, or go on."""
        with self.command.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command.words("run", self.rounds),
                env=dict(self.command.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def ending(self) -> str | None:
        """Return the exit code once it ended."""
        assert self.process is not None
        code = self.process.poll()
        return None if code is None else str(code)


@dataclass(kw_only=True)
class JobCoordinator:
    """`fedllm submit`, submitted again once its job ended before the run."""

    command: Command
    rounds: int
    kind: str = "resident"
    jobs: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Submit; while Slurm still lists the job that ended, that is refused."""
        until(self._submit, seconds=60)

    def _submit(self) -> bool:
        done = subprocess.run(
            self.command.words("submit", self.rounds, f"scheduler.coordinator={self.kind}"),
            env=dict(self.command.environment),
            capture_output=True,
            text=True,
            check=False,
        )
        with self.command.log.open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        if done.returncode:
            assert "as Slurm job" in done.stderr or "holds this run" in done.stderr, done.stderr
            return False
        self.jobs.append(done.stdout.removeprefix("coordinator job ").partition(";")[0])
        return True

    def ending(self) -> str | None:
        """Return `0`, or state and exit code of the job, once it neither waits nor runs."""
        words = ("squeue", "-h", "-t", "all", "-j", self.jobs[-1], "-O", "State:|,exit_code:|")
        state, status, _ = self.command.cluster.slurm(*words).split("|")
        if not has_ended(state):
            return None
        return {"COMPLETED": "0", "FAILED": f"FAILED {int(status) >> 8}"}.get(state, state)


@dataclass(kw_only=True)
class ChainCoordinator(JobCoordinator):
    """`fedllm submit` once: links follow each other, whatever ends one of them."""

    kind: str = "chained"

    def ending(self) -> str | None:
        """Return `0` once the run is done and no link is left; a chain that broke says so."""
        paths = RunPaths(root=self.command.root)
        # looked at first: a link may end between the two
        done = paths.round(self.rounds).record.exists()
        name = f"coordinator-fedllm-{RunRecord.read(paths.run).run_id}"
        if self.command.cluster.slurm("squeue", "-h", f"--name={name}", "-o", "%i").strip():
            return None
        return "0" if done else "no link left"


Coordinator = ProcessCoordinator | JobCoordinator
COORDINATORS: dict[str, type[Coordinator]] = {
    "process": ProcessCoordinator,
    "job": JobCoordinator,
    "chain": ChainCoordinator,
}


def environment_of(given: Mapping[str, str], cluster: Cluster, wires: Path) -> dict[str, str]:
    """Return the environment in which every Python of the run watches the wires."""
    hook = Path(__file__).with_name("hook")
    path = [str(hook), *filter(None, [given.get("PYTHONPATH")])]
    told = {"SLURM_CONF": str(cluster.conf), "FEDLLM_CHAOS_WIRES": str(wires)}
    return {**given, **told, "PYTHONPATH": ":".join(path), "PYTHONUNBUFFERED": "1"}
