"""A development cluster as tests use it."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DEVCLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "devcluster"
DAEMONS = "/usr/sbin:/sbin"
NODES = 2
# before any test changes PATH
ENVIRONMENT = dict(os.environ)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A running cluster of two nodes with four CPUs each, `threads` of them to a core.

    `lines` are further ones of slurm.conf; they replace keys of the development cluster.
    """

    root: Path
    port: int
    accounting: bool
    lines: str = ""
    threads: int = 1

    @property
    def conf(self) -> Path:
        return self.root / "etc" / "slurm.conf"

    def devcluster(self, *words: str) -> None:
        """Run a verb of slurm/devcluster."""
        settings = {
            "DEVCLUSTER_DIR": str(self.root),
            "DEVCLUSTER_PORT": str(self.port),
            "DEVCLUSTER_ACCOUNTING": str(int(self.accounting)),
            "DEVCLUSTER_NODES": str(NODES),
            "DEVCLUSTER_EXTRA_CONF": self.lines,
            "DEVCLUSTER_THREADS": str(self.threads),
        }
        # daemons inherit the output, so that a pipe would stay open
        with (self.root.parent / f"{self.root.name}.log").open("ab") as log:
            done = subprocess.run(
                [DEVCLUSTER, *words],
                env=ENVIRONMENT | settings,
                stdout=log,
                stderr=log,
                check=False,
            )
        assert done.returncode == 0, f"devcluster {words}: {Path(log.name).read_text()}"

    def slurm(self, *words: str, environment: Mapping[str, str] = ENVIRONMENT) -> str:
        """Run a Slurm command."""
        given = {**environment, "SLURM_CONF": str(self.conf)}
        done = subprocess.run(words, env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout


def is_installed() -> bool:
    """Say whether Slurm's daemons are there."""
    return shutil.which("slurmctld", path=f"{os.environ['PATH']}:{DAEMONS}") is not None


@contextmanager
def running(*, accounting: bool, lines: str = "", threads: int = 1) -> Iterator[Cluster]:
    """Start a cluster; stop it and remove everything it wrote at the end."""
    # a short path: sockets lie in it; munge wants it open to all
    folder = Path(tempfile.mkdtemp(prefix="fedllm-slurm-"))
    folder.chmod(0o755)
    port = free_ports(NODES + 2)
    cluster = Cluster(
        root=folder / "c", port=port, accounting=accounting, lines=lines, threads=threads
    )
    try:
        cluster.devcluster("up")
        yield cluster
    finally:
        cluster.devcluster("wipe")
        shutil.rmtree(folder)


def free_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody listens on."""
    # below the range that outgoing connections are given
    first = random.Random(os.getpid()).randrange(17000, 30000)
    while not all(_is_free(port) for port in range(first, first + count)):
        first += count
    return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def until(condition: Callable[[], object], *, seconds: float = 30.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def intercept(folder: Path, command: str, script: str, environment: Mapping[str, str]) -> str:
    """Put a program in front of a command and return the PATH that finds it first.

    `$REAL` is the real command in the script, so that it can stop or kill before or after it:
    the product has no fault points of its own.
    """
    path = environment["PATH"]
    found = (Path(place) / command for place in path.split(os.pathsep))
    real = next(program for program in found if program.exists())
    folder.mkdir(exist_ok=True)
    wrapper = folder / command
    wrapper.write_text(f"#!/bin/bash\nREAL={real}\n{script}\n")
    wrapper.chmod(0o755)
    return f"{folder}{os.pathsep}{path}"


def program(jobs_folder: Path, name: str, body: str) -> None:
    """Write a job program of the test's own."""
    jobs_folder.mkdir(exist_ok=True)
    (jobs_folder / f"{name}.py").write_text(f"# {sys.executable}\n{body}")
