"""A cluster's limits as they are read, and what is refused because of them; a real Slurm."""

import pytest

from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.parametrize("cluster", ["limited"], indirect=True)]


def test_it_is_limited(cluster: Cluster) -> None:
    assert "MaxArraySize            = 10" in cluster.slurm("scontrol", "show", "config")
    said = cluster.slurm("sacctmgr", "-nP", "show", "assoc", "format=account,user,maxsubmit")
    assert any(line.startswith("lab|") and line.endswith("|5") for line in said.splitlines())
