"""A run whose clients train in two processes each, killed and resumed."""

from pathlib import Path

import psutil
import pytest

from fedllm.storage.paths import RunPaths
from fedllm.storage.updates import read_update
from tests.cli.commands import fedllm, in_process, one_line, start, wait_until
from tests.cli.test_run import local, workers_of
from tests.rounds.simulation import states
from tests.tiny import Tiny

TWO = (
    "training.engine=zero",
    "training.processes=2",
    "training.checkpoint_every_minutes=1e-9",
    "clients.cohort.count=2",
    "scheduler.workers=1",
    "rounds=1",
    "evaluation.every=0",
)


def options(*given: str) -> list[str]:
    return [word for override in given for word in ("--set", override)]


@pytest.mark.slow
def test_two_processes_train_a_run_which_resumes_to_the_same_bits(
    tiny: Tiny, tmp_path: Path
) -> None:
    undisturbed, killed, log = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "log"
    done = fedllm(*local(tiny, undisturbed, *options(*TWO)))
    assert done.returncode == 0, done.stderr
    paths = RunPaths(root=undisturbed).round(1)
    records = [u.record for path in paths.updates.glob("*.safetensors") for u in read_update(path)]
    assert len(records) == 2
    assert all(record.environment["processes"] == "2" for record in records)

    process = start(*local(tiny, killed, *options(*TWO)), log=log)
    wait_until(lambda: list(RunPaths(root=killed).round(1).checkpoints.rglob("*.safetensors")), 200)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    assert set(states(killed)) == {"0000"}
    assert fedllm("resume", killed).returncode == 0
    assert states(killed) == states(undisturbed)


def test_tasks_of_several_processes_are_planned_and_refused_inline(
    tiny: Tiny, tmp_path: Path
) -> None:
    changes = options("training.engine=zero", "training.processes=2")
    planned = in_process("plan", tiny.config, *changes, "--set", "scheduler.kind=local")
    assert planned.returncode == 0, planned.stderr
    assert "processes" in planned.stdout
    refused = one_line(in_process("run", tiny.config, "--run-dir", tmp_path / "run", *changes))
    assert "scheduler.kind: inline runs a task in one process" in refused
