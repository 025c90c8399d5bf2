"""Why nothing runs, what is known while Slurm is away, and what limits make of a plan."""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from fedllm.storage.paths import RunPaths
from tests.cli.commands import FEDLLM, fedllm, in_process, start
from tests.slurm.cluster import Cluster, free_ports, until
from tests.slurm.runs import (
    HELD,
    Begun,
    arrays,
    each_trained_once,
    python_of,
    settings,
    stopped_workers,
)

pytestmark = pytest.mark.slurm


def status(root: Path) -> Any:
    shown = in_process("status", root, "--json")
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)


def without_controller(cluster: Cluster, root: Path, folder: Path) -> str:
    """Return what status says where slurmctld does not answer."""
    conf = re.sub(
        r"(?m)^SlurmctldPort=.*", f"SlurmctldPort={free_ports(1)}", cluster.conf.read_text()
    )
    (folder / "away.conf").write_text(conf)
    shown = fedllm("status", root, SLURM_CONF=str(folder / "away.conf"))
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_status_tells_why_tasks_wait_and_who_works_where_and_knows_the_files_without_slurm(
    begun: Begun, cluster: Cluster, tmp_path: Path
) -> None:
    root = begun.run("run", rounds=1)
    attempt = RunPaths(root=root).round(2).attempt(1)
    coordinator = start(*begun.words(root, HELD, "evaluation.every=0"), log=tmp_path / "log")
    until(lambda: arrays(cluster, root, "r0002") and attempt.jobs.exists(), seconds=60)
    ((name, (array,)),) = arrays(cluster, root, "r0002").items()
    (waiting,) = status(root)["queue"]["arrays"]
    assert (waiting["name"], waiting["waiting"], waiting["running"]) == (name, 2, 0)
    (reason,) = waiting["reasons"]
    assert (reason["reason"], reason["tasks"]) == ("JobHeldUser", 2)
    assert "scontrol release" in reason["advice"]

    cluster.slurm("scontrol", "release", f"{array}_0")
    (held,) = stopped_workers(attempt, 1)
    found = status(root)
    (task,) = found["current"]["tasks"]
    assert (task["task"], task["node"], task["log"]) == (f"{array}_0", held.node, held.log)
    assert Path(task["log"]).exists()
    (waiting,) = found["queue"]["arrays"]
    assert (waiting["waiting"], waiting["running"]) == (1, 1)
    assert found["state"] == "running"
    shown = in_process("status", root).stdout
    assert f"{name}: 1 running, 1 waiting" in shown

    began = time.monotonic()
    shown = without_controller(cluster, root, tmp_path)
    assert time.monotonic() - began < 60
    assert shown.count("Slurm does not answer now") == 1
    assert f"{array}_0" in shown
    assert "0 of 4 clients published" in shown

    python_of(f"{array}_0").resume()
    cluster.slurm("scontrol", "release", array)
    assert coordinator.wait(timeout=100) == 0, (tmp_path / "log").read_text()
    assert each_trained_once(RunPaths(root=root).round(2))
    found = status(root)
    assert (found["state"], found["queue"]["arrays"]) == ("done", [])
    assert found["task_hours"] > 0


def offered(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the job that a command offers instead of computing on a login node."""
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "computing on this host" in line)
    return line.partition("; as a job: ")[2]


def as_job(command: str) -> "subprocess.CompletedProcess[str]":
    path = f"{Path(FEDLLM).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(command),
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_what_computes_on_a_login_node_says_so_and_offers_a_job_that_does_the_same(
    begun: Begun, cluster: Cluster
) -> None:
    del cluster
    memory = "scheduler.sbatch.default.mem=500"
    on_slurm = settings("scheduler.kind=slurm", memory)
    job = offered(fedllm("plan", begun.tiny.config, *on_slurm, "--set", "data.cutoff_tokens=150"))
    assert job.startswith(f"srun --mem=500 fedllm prepare {begun.tiny.config} --set ")
    assert "computing on this host" not in as_job(job.replace("=150", "=151")).stderr
    prepared = fedllm("plan", begun.tiny.config, *on_slurm, "--set", "data.cutoff_tokens=151")
    assert "computing on this host" not in prepared.stderr and prepared.stdout.startswith(
        "2 rounds"
    )

    root = begun.run("run", rounds=1)
    assert in_process("resume", root, *on_slurm).returncode == 0
    # an array of jobs scores; within a job the command computes itself
    shared = fedllm("evaluate", root)
    assert shared.returncode == 0, shared.stderr
    assert "computing on this host" not in shared.stderr
    (job_of_array,) = RunPaths(root=root).all_requested()
    assert job_of_array.job(1).jobs.exists()
    alone = as_job(f"srun --mem=500 fedllm evaluate {root}")
    assert alone.stdout == shared.stdout


@pytest.mark.parametrize("cluster", ["limited"], indirect=True)
def test_a_plan_says_in_one_line_what_limits_make_of_its_arrays(
    begun: Begun, cluster: Cluster
) -> None:
    del cluster
    words = settings(
        "scheduler.kind=slurm",
        "scheduler.clients_per_task=1",
        "clients.cohort.count=8",
        "scheduler.sbatch.default.partition=short",
        *(f"scheduler.sbatch.{job}.time=30" for job in ("prepare", "aggregate", "evaluate")),
        "scheduler.query_seconds=0.1",
    )
    shown = in_process("plan", begun.tiny.config, *words)
    assert shown.returncode == 0, shown.stderr
    (line,) = (line for line in shown.stdout.splitlines() if "MaxArraySize" in line)
    # one place is kept for the aggregation
    assert line == (
        "MaxArraySize 10, MaxSubmitJobs 5 (room for 4 tasks now): "
        "8 tasks go out in 2 waves of up to 4"
    )
