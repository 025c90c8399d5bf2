"""A controller that is away for a while, as a run lives through it."""

from pathlib import Path

import pytest

from tests.cli.commands import start
from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import HELD, PATIENCE_SECONDS, Begun, arrays

pytestmark = pytest.mark.slurm


def test_a_run_tells_once_that_slurm_is_away_waits_and_goes_on(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.run("run", rounds=1)
    log = begun.folder / "log"
    with start(*begun.words(root, HELD), log=log) as running:
        try:
            array = until_away(cluster, root, log)
            assert running.poll() is None
            cluster.devcluster("start-controller")
            until(lambda: "the scheduler answers again" in log.read_text(), seconds=60)
            cluster.slurm("scontrol", "release", array)
            assert running.wait(PATIENCE_SECONDS) == 0, log.read_text()
        finally:
            running.kill()
            cluster.devcluster("start-controller")
    said = log.read_text()
    assert said.count("Slurm does not answer") == said.count("answers again") == 1, said
    assert states(root) == undisturbed
    assert len(arrays(cluster, root, "r0002-a0")) == 1


def until_away(cluster: Cluster, root: Path, log: Path) -> str:
    """Kill the controller once it has saved a run's array, and wait until the run has noticed."""
    until(lambda: arrays(cluster, root, "r0002-a01-"), seconds=PATIENCE_SECONDS)
    ((name, (array,)),) = arrays(cluster, root, "r0002-a01-").items()
    saved = cluster.root / "state" / "slurmctld" / "job_state"
    until(lambda: saved.exists() and name.encode() in saved.read_bytes())
    cluster.devcluster("stop-controller")
    until(lambda: "Slurm does not answer" in log.read_text(), seconds=60)
    return array
