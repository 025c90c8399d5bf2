"""Clients of four processes on two nodes: preempted, killed, begun anew, and as trained alone."""

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import SubmissionRecord, TaskRecord
from tests.cli.commands import in_process, start
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import (
    ON_CLUSTER,
    PATIENCE_SECONDS,
    claims,
    each_trained_once,
    published,
    settings,
)
from tests.tiny import Tiny

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# SGD: AdamW makes of rounding what it makes of gradients
TRAINING = (
    "evaluation.every=0",
    "method.local=fedavg",
    "training.learning_rate=0.05",
    "training.batch_size=4",
    "training.max_steps=8",
    "training.epochs=9",
)
ZERO = (
    *ON_CLUSTER,
    "training.engine=zero",
    "training.zero.stage=3",
    "training.processes=4",
    "training.nodes=2",
    "training.checkpoint_every_minutes=1e-9",
    "scheduler.max_parallel=1",
    "scheduler.linger_minutes=5",
    "training.zero.restart_after_clients=2",
)
ANEW = "new processes go on, after 2 clients"
LOST = 3


def process_of(task: str, rank: int) -> psutil.Process:
    """Return the Python process of a task that has a rank."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, variables = process.info["cmdline"] or [], process.info["environ"] or {}
        of_task = variables.get("FEDLLM_TASK") == task and "client.py" in " ".join(words)
        if of_task and variables.get("SLURM_PROCID") == str(rank):
            return process
    raise AssertionError(f"{task}: no process of rank {rank}")


def training_task(paths: RoundPaths) -> str:
    """Return the task that trains a round, once a client in training is saved."""
    until(lambda: list(paths.checkpoints.rglob("*.safetensors")), seconds=PATIENCE_SECONDS)
    return claims(paths.attempt(1))[0].task


def renewals(root: Path, task: str) -> int:
    """Return how often the processes of a task were replaced by new ones."""
    logs = (root / "logs").rglob(f"{task}_0_log.out")
    return sum(log.read_text().count(ANEW) for log in logs)


def changes(root: Path) -> dict[str, torch.Tensor]:
    """Return module -> product of the last state's factors."""
    state = load_file(RunPaths(root=root).round(2).global_state)
    modules = {name.rpartition(".")[0] for name in state}
    return {m: state[f"{m}.U"] @ torch.diag(state[f"{m}.S"]) @ state[f"{m}.Vh"] for m in modules}


def test_four_processes_on_two_nodes_come_to_what_one_does_preempted_and_killed(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    root, plain, log = tmp_path / "run", tmp_path / "plain", tmp_path / "log"
    process = start("run", tiny.config, "--run-dir", root, *settings(*TRAINING, *ZERO), log=log)
    alone = in_process("run", tiny.config, "--run-dir", plain, *settings(*TRAINING))
    assert alone.returncode == 0, alone.stderr
    first, second = (RunPaths(root=root).round(number) for number in (1, 2))

    task = training_task(first)
    cluster.slurm(
        "sbatch", "--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null",
        "--wrap=sleep 1",
    )  # fmt: skip
    until(second.cohort.exists, seconds=PATIENCE_SECONDS)
    resumed = [record for record in published(first) if record.resumed_at]
    assert [record.task for record in resumed] == [task]
    assert each_trained_once(first)
    # preempted once; processes that begin anew are the same start of the task
    assert TaskRecord.read(first.attempt(1).task(task)).starts == 2
    assert not first.attempt(2).root.exists()
    assert renewals(root, task)

    assert training_task(second) == task
    process_of(task, LOST).kill()
    assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
    said = log.read_text()
    assert f"{task}: process {LOST} of 4 ended first; log " in said
    assert f"{task}_{LOST}_log.out" in said
    assert second.attempt(1).task_error(task).exists()
    assert not second.attempt(3).root.exists()

    (array,) = SubmissionRecord.read(first.attempt(1).submission).arrays
    assert (array.processes, array.nodes, array.tasks) == (4, 2, 1)
    assert each_trained_once(second)
    assert {record.environment["processes"] for record in published(second)} == {"4"}
    found, expected = changes(root), changes(plain)
    assert found.keys() == expected.keys()
    distances = [float((found[m] - expected[m]).norm() / expected[m].norm()) for m in expected]
    assert max(distances) < 1e-5, distances
