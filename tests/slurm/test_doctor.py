"""What is wrong with a cluster or a run's place on it, said before or as soon as it can be."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.config.models import SchedulerSection
from fedllm.doctor.reach_probe import ReachProbe
from fedllm.storage.trust.secret import STATE_VARIABLE, user_secret
from tests.cli.commands import fedllm, in_process, one_line
from tests.slurm.blindness import blind_node
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ON_CLUSTER, settings
from tests.tiny import Tiny

pytestmark = pytest.mark.slurm

ON_N2 = "scheduler.sbatch.default.nodelist=n2"


@pytest.fixture
def hidden(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A folder that node n2 does not see."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    with blind_node(cluster, "n2", folder):
        yield folder


def findings(done: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, str]]:
    """Return what a doctor found, by check."""
    assert not done.stderr, done.stderr
    return {each["check"]: each for each in json.loads(done.stdout)}


def diagnosis(tiny: Tiny, root: Path, *changes: str) -> "subprocess.CompletedProcess[str]":
    words = settings(*ON_CLUSTER, *changes)
    return in_process("doctor", tiny.config, "--run-dir", root, "--json", *words)


def test_a_run_directory_that_the_node_cannot_see_is_refused_in_one_line(
    tiny: Tiny, hidden: Path
) -> None:
    root = hidden / "run"
    done = fedllm("run", tiny.config, "--run-dir", root, *settings(*ON_CLUSTER, ON_N2))
    told = one_line(done)
    assert f"{root}: node n2 cannot see it" in told
    assert "fedllm doctor" in told
    # nothing to resume is left behind
    assert not root.exists()


def test_a_doctor_names_the_directory_and_the_node_that_does_not_see_it(
    tiny: Tiny, hidden: Path
) -> None:
    done = diagnosis(tiny, hidden / "run", ON_N2)
    assert done.returncode == 2
    failed = [each for each in findings(done).values() if each["level"] == "fail"]
    (told,) = failed
    assert told["check"] == f"node n2 (every kind of job): sees {hidden}"
    assert "is another folder there" in told["found"]
    assert "--run-dir" in told["change"]
    assert not list(hidden.iterdir())


def test_a_doctor_names_the_node_that_does_not_see_the_secret(
    tiny: Tiny, hidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(hidden / "state"))
    user_secret(create=True)
    done = diagnosis(tiny, tmp_path / "run", ON_N2)
    failed = [each for each in findings(done).values() if each["level"] == "fail"]
    (told,) = failed
    assert told["check"] == f"node n2 (every kind of job): {STATE_VARIABLE}"
    assert "cannot be read here" in told["found"]


@pytest.mark.usefixtures("cluster")
def test_processes_that_do_not_reach_each_other_are_told_which_networks_there_are(
    tmp_path: Path,
) -> None:
    section = SchedulerSection(kind="slurm", interface="ib7")
    flags = {"nodes": 2, "ntasks": 2, "ntasks-per-node": 1}
    probe = ReachProbe(section=section, flags=flags, folder=tmp_path, wait_seconds=60.0)
    (told,) = probe.findings("client large")
    assert (told.check, told.level) == ("processes of a task (client large)", "fail")
    assert "ib7" in told.found
    assert "scheduler.interface: a network that all nodes of a task share (there: " in told.change
    assert "lo" in told.change


@pytest.mark.parametrize("cluster", ["accounting"], indirect=True)
def test_a_healthy_cluster_has_no_failures_and_nothing_is_left_on_it(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    several = ("training.engine=zero", "training.processes=2", "training.nodes=2")
    own = ("scheduler.interface=lo", f"storage.node_local={tmp_path}")
    done = diagnosis(tiny, tmp_path / "run", *several, *own)
    found = findings(done)
    assert done.returncode == 0, found
    node = next(name.partition(":")[0] for name in found if name.startswith("node "))
    checked = ["packages", "GPUs", "processors", "storage.node_local", "Slurm's commands"]
    checked += ["FEDLLM_STATE"]
    for check in (f"{node}: sees {tmp_path}", *(f"{node}: {check}" for check in checked)):
        assert found[check]["level"] == "ok", found[check]
    assert "22.05" in found["slurm"]["found"]
    assert found["accounting"]["found"].startswith("slurmdbd")
    assert found["preemption in low"]["found"].startswith("REQUEUE by partition_prio")
    assert found["sbatch --test-only"]["found"] == "jobs of every kind would be accepted"
    reach = found["processes of a task (client large, small)"]
    assert reach["level"] == "ok", reach
    words = r"2 on n1, n2 reach each other over lo: a sum of 16.0 MiB takes [\d.]+ s \(.*/?, gloo\)"
    assert re.fullmatch(words, reach["found"]), reach["found"]
    assert not list(tmp_path.iterdir())
    assert not cluster.slurm("squeue", "--noheader", "--states=PENDING,RUNNING")


@pytest.mark.usefixtures("cluster")
def test_each_wrong_option_is_told_with_its_key_and_the_rest_is_looked_at(
    tiny: Tiny, tmp_path: Path
) -> None:
    changes = ("scheduler.sbatch.aggregate.partition=nowhere", "scheduler.python=/no/python")
    done = diagnosis(tiny, tmp_path / "run", *changes)
    assert done.returncode == 2
    found = findings(done)
    failed = {check: f["found"] for check, f in found.items() if f["level"] == "fail"}
    refused = failed.pop("sbatch --test-only, aggregate")
    assert refused.startswith("scheduler.sbatch.aggregate.partition: nowhere: refused by sbatch")
    assert found["compute node for aggregate"]["level"] == "not done"
    (python,) = failed.values()
    assert "/no/python: No such file or directory" in python


def test_a_full_cluster_is_said_with_slurms_reason_and_the_probe_is_withdrawn(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("--exclusive", "--nodes=2", "--time=5", "--output=/dev/null", "--wrap=sleep 300")
    cluster.slurm("sbatch", *words)
    done = fedllm("doctor", "--run-dir", tmp_path / "run", "--wait", "2")
    assert done.returncode == 0, done.stderr
    assert "no node within 2 s (Slurm's reason: " in done.stdout
    assert "fedllm doctor --wait 3600" in done.stdout
    assert "fedllm-doctor" not in cluster.slurm("squeue", "-h", "-o", "%j", "--states=PENDING")


@pytest.mark.parametrize("cluster", ["limited"], indirect=True)
def test_limits_and_rights_of_the_user_are_told(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    changes = ("scheduler.sbatch.aggregate.account=denied", "scheduler.python=/no/python")
    found = findings(diagnosis(tiny, tmp_path / "run", *changes))
    limits = found["limits of account lab, QOS normal, partition low"]["found"]
    assert "queued 5" in limits
    assert "scheduler.sbatch.aggregate.account" in found["sbatch --test-only, aggregate"]["found"]
    assert f"MaxArraySize {cluster_array_size(cluster)}" in found["arrays"]["found"]


def cluster_array_size(cluster: Cluster) -> str:
    said = cluster.slurm("scontrol", "show", "config")
    return next(line.split()[-1] for line in said.splitlines() if line.startswith("MaxArraySize"))
