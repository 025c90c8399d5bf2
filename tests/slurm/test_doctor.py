"""What is wrong with a cluster or a run's place on it, said before or as soon as it can be."""

from pathlib import Path

import pytest

from tests.cli.commands import fedllm, one_line
from tests.slurm.blindness import blind_node
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ON_CLUSTER, settings
from tests.tiny import Tiny

pytestmark = pytest.mark.slurm


def test_a_run_directory_that_the_node_cannot_see_is_refused_in_one_line(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    root = hidden / "run"
    words = settings(*ON_CLUSTER, "scheduler.sbatch.default.nodelist=n2")
    with blind_node(cluster, "n2", hidden):
        done = fedllm("run", tiny.config, "--run-dir", root, *words)
    told = one_line(done)
    assert f"{root}: node n2 cannot see it" in told
    assert "fedllm doctor" in told
    # nothing to resume is left behind
    assert not root.exists()
