"""Real Slurm clusters, started once each when needed: without and with accounting, with limits."""

import os
import pwd
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster, is_installed, running, until
from tests.slurm.runs import Begun
from tests.slurm.workplace import Workplace
from tests.tiny import Tiny

# Few tasks in an array, enforced limits, and a partition of one node for half an hour at most.
LIMITS = """MaxArraySize=10
AccountingStorageEnforce=associations,limits,qos
PartitionName=short Nodes=n1 MaxTime=30 State=UP"""


def _cluster(*, accounting: bool, lines: str = "", threads: int = 1) -> Iterator[Cluster]:
    if not is_installed():
        message = "Slurm is not installed: make slurm-packages"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    with running(accounting=accounting, lines=lines, threads=threads) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def plain_cluster() -> Iterator[Cluster]:
    """A cluster without accounting."""
    yield from _cluster(accounting=False)


@pytest.fixture(scope="session")
def accounting_cluster() -> Iterator[Cluster]:
    """A cluster with slurmdbd."""
    yield from _cluster(accounting=True)


@pytest.fixture(scope="session")
def limited_cluster() -> Iterator[Cluster]:
    """A cluster of `LIMITS`; this user has account `lab`, not `denied`, and 5 jobs at most."""
    user = pwd.getpwuid(os.getuid()).pw_name
    for cluster in _cluster(accounting=True, lines=LIMITS):
        for words in (
            ("add", "account", "lab", "denied"),
            ("add", "user", user, "account=lab"),
            ("modify", "user", user, "set", "DefaultAccount=lab"),
            ("modify", "user", "where", f"name={user}", "account=lab", "set", "MaxSubmitJobs=5"),
        ):
            cluster.slurm("sacctmgr", "-i", *words)
        yield cluster


@pytest.fixture(scope="session")
def threads_cluster() -> Iterator[Cluster]:
    """A cluster whose cores have two threads and are given whole, without accounting."""
    yield from _cluster(accounting=False, lines="SelectTypeParameters=CR_Core", threads=2)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster that this process's Slurm commands mean; its queue is empty again afterwards.

    Without accounting unless parametrized with "accounting", "limited" or "threads".
    """
    kind = getattr(request, "param", "plain")
    chosen: Cluster = request.getfixturevalue(f"{kind}_cluster")
    monkeypatch.setenv("SLURM_CONF", str(chosen.conf))
    # after a crash of a node or a restart of slurmctld, nodes may not have answered yet
    until(lambda: _nodes_are_up(chosen))
    yield chosen
    chosen.slurm("scancel", "--full", f"--user={os.getuid()}")


def _nodes_are_up(cluster: Cluster) -> bool:
    states = cluster.slurm("sinfo", "--noheader", "--format=%T")
    return not any(word in states for word in ("down", "unknown", "*"))


@pytest.fixture
def make(cluster: Cluster, tmp_path: Path) -> Callable[..., Workplace]:  # noqa: ARG001
    return lambda **section: Workplace(tmp_path, **section)


@pytest.fixture
def begun(tiny: Tiny, tmp_path: Path) -> Begun:
    """Runs of the tiny federation whose first round was made inline."""
    return Begun(tiny=tiny, folder=tmp_path)


@pytest.fixture(scope="session")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checksums of the tiny federation's server states, of two rounds made inline."""
    begun = Begun(tiny=tiny, folder=tmp_path_factory.mktemp("undisturbed"))
    return states(begun.run("run", rounds=2))
