"""A node of the development cluster that does not see a folder, as one without a shared mount."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.cluster import DEVCLUSTER, ENVIRONMENT, Cluster, until


@contextmanager
def blind_node(cluster: Cluster, node: str, folder: Path) -> Iterator[None]:
    """Start a node's slurmd anew where an empty file system lies over `folder`."""
    _need_mounts()
    try:
        cluster.devcluster("crash-node", node)
        # mounts of the namespace end with the daemon and its steps
        mount = f"mount -t tmpfs tmpfs '{folder}' && exec '{DEVCLUSTER}' start-node {node}"
        settings = {"DEVCLUSTER_DIR": str(cluster.root), "DEVCLUSTER_PORT": str(cluster.port)}
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", mount],
            env=ENVIRONMENT | settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        _await(cluster, node)
        yield
    finally:
        # a job whose end is under way when its node goes would keep it for a minute
        cluster.slurm("scancel", f"--nodelist={node}", f"--user={os.getuid()}")
        until(lambda: not cluster.slurm("squeue", "--noheader", f"--nodelist={node}"))
        cluster.devcluster("crash-node", node)
        cluster.devcluster("start-node", node)
        _await(cluster, node)


def _need_mounts() -> None:
    done = subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        pytest.skip("needs the right to make a mount namespace (root)")


def _await(cluster: Cluster, node: str) -> None:
    """Wait until a node takes jobs again: a job on it runs to its end."""
    words = ("srun", "--immediate=1", f"--nodelist={node}", "--time=1", "true")

    def answers() -> bool:
        try:
            cluster.slurm(*words)
        except AssertionError:
            return False
        return True

    until(answers)
