"""Real Slurm clusters, one with accounting and one without, each started once when needed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rounds.simulation import states
from tests.slurm.cluster import NODES, Cluster, free_ports
from tests.slurm.runs import Begun
from tests.tiny import Tiny

DAEMONS = "/usr/sbin:/sbin"


def _cluster(*, accounting: bool) -> Iterator[Cluster]:
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:{DAEMONS}") is None:
        message = "Slurm is not installed: make slurm-packages"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    # a short path: sockets lie in it; munge wants it open to all
    folder = Path(tempfile.mkdtemp(prefix="fedllm-slurm-"))
    folder.chmod(0o755)
    cluster = Cluster(root=folder / "c", port=free_ports(NODES + 2), accounting=accounting)
    try:
        cluster.devcluster("up")
        yield cluster
    finally:
        cluster.devcluster("wipe")
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def plain_cluster() -> Iterator[Cluster]:
    """A cluster without accounting."""
    yield from _cluster(accounting=False)


@pytest.fixture(scope="session")
def accounting_cluster() -> Iterator[Cluster]:
    """A cluster with slurmdbd."""
    yield from _cluster(accounting=True)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster that this process's Slurm commands mean; its queue is empty again afterwards.

    Without accounting unless parametrized with "accounting".
    """
    kind = getattr(request, "param", "plain")
    chosen: Cluster = request.getfixturevalue(f"{kind}_cluster")
    monkeypatch.setenv("SLURM_CONF", str(chosen.conf))
    yield chosen
    chosen.slurm("scancel", "--full", f"--user={os.getuid()}")


@pytest.fixture
def begun(tiny: Tiny, tmp_path: Path) -> Begun:
    """Runs of the tiny federation whose first round was made inline."""
    return Begun(tiny=tiny, folder=tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checksums of the tiny federation's server states, of two rounds made inline."""
    begun = Begun(tiny=tiny, folder=tmp_path_factory.mktemp("undisturbed"))
    return states(begun.run("run", rounds=2))
