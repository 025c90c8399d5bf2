"""The coordinator as a Slurm job: submitted, requeued, refused to a second one, cancelled."""

import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

from fedllm.storage.lease import current_lease
from fedllm.storage.paths import RunPaths
from tests.cli.commands import fedllm, one_line
from tests.rounds.simulation import states
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import (
    HELD,
    ON_CLUSTER,
    PATIENCE_SECONDS,
    Begun,
    arrays,
    each_trained_once,
    settings,
    state_of,
)
from tests.tiny import Tiny

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "coordinator.sbatch"


def logs(root: Path) -> str:
    return "\n".join(path.read_text() for path in root.glob("logs/coordinator-*.log"))


def wait_for_array(cluster: Cluster, root: Path, name: str) -> str:
    """Wait until the array of an attempt is submitted; return its id."""
    paths = RunPaths(root=root)
    until(lambda: paths.run.exists() and arrays(cluster, root, name), seconds=PATIENCE_SECONDS)
    ((id_,),) = arrays(cluster, root, name).values()
    return id_


@pytest.mark.parametrize("cluster", ["accounting"], indirect=True)
def test_a_submitted_coordinator_refuses_others_and_goes_on_when_requeued_and_when_killed(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root, config = begun.folder / "run", begun.tiny.config
    changes = ("evaluation.every=0", "rounds=1", *ON_CLUSTER, "scheduler.max_parallel=1", HELD)
    words = ("submit", config, "--run-dir", root, *settings(*changes))
    submitted = fedllm(*words)
    told = re.fullmatch(rf"coordinator job (\d+); fedllm status {root}\n", submitted.stdout)
    assert told, submitted.stdout + submitted.stderr
    job = told[1]
    array = wait_for_array(cluster, root, "r0001-a01")
    assert f"Slurm job {job}" in fedllm("status", root).stdout
    assert f"Slurm job {job}" in one_line(fedllm("resume", root))
    assert f"Slurm job {job}" in one_line(fedllm(*words))
    lease, _ = current_lease(RunPaths(root=root))
    cluster.slurm("scontrol", "requeue", job)
    until(lambda: current_lease(RunPaths(root=root))[0] > lease, seconds=PATIENCE_SECONDS)
    requeued, holder = current_lease(RunPaths(root=root))
    assert holder
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: current_lease(RunPaths(root=root))[0] > requeued, seconds=PATIENCE_SECONDS)
    _, holder = current_lease(RunPaths(root=root))
    assert holder
    # all of them the same start by a person
    assert (holder.slurm_job, holder.origin) == (job, lease)
    cluster.slurm("scontrol", "release", array)
    until(lambda: state_of(cluster, job) not in {"PENDING", "RUNNING"}, seconds=PATIENCE_SECONDS)
    assert state_of(cluster, job) == "COMPLETED", logs(root)
    (ids,) = arrays(cluster, root, "r0001-a0").values()
    assert ids == {array}
    assert each_trained_once(RunPaths(root=root).round(1))
    assert states(root).items() <= undisturbed.items()


def test_cancel_ends_the_jobs_of_its_run_alone_and_the_script_submitted_again_goes_on(
    begun: Begun, cluster: Cluster, undisturbed: dict[str, str]
) -> None:
    root = begun.run("run", rounds=1)
    other = cluster.slurm(
        "sbatch", "--parsable", "--output=/dev/null", "--array=0-1", "--wrap=sleep 300"
    ).strip()
    coordinator = script(begun, cluster, root, HELD)
    array = wait_for_array(cluster, root, "r0002-a01")
    cancelled = fedllm("cancel", root)
    assert cancelled.returncode == 0, cancelled.stderr
    assert cancelled.stdout == f"coordinator job {coordinator} cancelled\n2 tasks cancelled\n"
    assert state_of(cluster, coordinator) not in {"RUNNING", "COMPLETING"}
    assert state_of(cluster, array) == "CANCELLED"
    assert set(cluster.slurm("squeue", "-h", "-o", "%F").split()) == {other}
    again = script(begun, cluster, root)
    until(lambda: state_of(cluster, again) not in {"PENDING", "RUNNING"}, seconds=PATIENCE_SECONDS)
    assert state_of(cluster, again) == "COMPLETED", logs(root)
    assert each_trained_once(RunPaths(root=root).round(2))
    assert states(root) == undisturbed


def script(begun: Begun, cluster: Cluster, root: Path, *changes: str) -> str:
    """Submit the coordinator's script for the second round, as by hand; return the job's id."""
    changes = ("evaluation.every=0", *ON_CLUSTER, *changes)
    words = ["sbatch", "--parsable", f"--output={root}/logs/coordinator-%j.log", str(SCRIPT)]
    words += [str(begun.tiny.config), "--run-dir", str(root), *settings(*changes)]
    environment = {**os.environ, "FEDLLM_PYTHON": shlex.quote(sys.executable)}
    return cluster.slurm(*words, environment=environment).strip()


def test_a_class_beside_the_configuration_is_found_by_all_jobs_of_a_run_submitted_elsewhere(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    project, away, root = tmp_path / "project", tmp_path / "away", tmp_path / "run"
    for folder in (project, away):
        folder.mkdir()
    source = "from fedllm.methods.spectral.flexlora import FlexLora\nclass Mine(FlexLora): ...\n"
    (project / "mine_on_slurm.py").write_text(source, encoding="utf-8")
    config = shutil.copy(tiny.config, project)
    changes = ("rounds=1", "evaluation.every=0", "scheduler.clients_per_bundle=4")
    own = "method.name=mine_on_slurm:Mine"
    words = settings(*ON_CLUSTER, *changes, own)
    done = fedllm("submit", config, "--run-dir", root, *words, cwd=away)
    assert done.returncode == 0, done.stderr
    job = done.stdout.removeprefix("coordinator job ").partition(";")[0]
    until(lambda: state_of(cluster, job) in {"", "COMPLETED", "FAILED"}, seconds=PATIENCE_SECONDS)
    assert RunPaths(root=root).round(1).record.exists(), logs(root)
