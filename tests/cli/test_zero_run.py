"""A run whose small clients train alone and whose large ones in two processes, resumed."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, EvaluationRecord, SubmissionRecord
from fedllm.storage.updates import read_update
from tests.cli.commands import fedllm, in_process, one_line, start, wait_until
from tests.cli.test_run import local, workers_of
from tests.rounds.simulation import states
from tests.tiny import Tiny

TWO = (
    "clients.tiers.large.engine=zero",
    "clients.tiers.large.processes=2",
    "training.checkpoint_every_minutes=1e-9",
    "clients.cohort.count=4",
    "scheduler.workers=1",
    "rounds=1",
    "evaluation.every=0",
)


def options(*given: str) -> list[str]:
    return [word for override in given for word in ("--set", override)]


@pytest.mark.slow
def test_tiers_train_with_engines_of_their_own_and_resume_to_the_same_bits(
    tiny: Tiny, tmp_path: Path
) -> None:
    undisturbed, killed, log = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "log"
    done = fedllm(*local(tiny, undisturbed, *options(*TWO)))
    assert done.returncode == 0, done.stderr
    paths = RunPaths(root=undisturbed).round(1)
    records = [u.record for path in paths.updates.glob("*.safetensors") for u in read_update(path)]
    tiers = {client.id: client.tier for client in CohortRecord.read(paths.cohort).clients}
    assert set(tiers.values()) == {"small", "large"}
    processes = {r.client: r.environment.get("processes", "1") for r in records}
    assert processes == {c: {"small": "1", "large": "2"}[tier] for c, tier in tiers.items()}
    assert "environments" not in done.stdout + done.stderr

    client, scratch = next(c for c in tiers if tiers[c] == "large"), tmp_path / "scratch"
    program = Path(__file__).parents[2] / "jobs" / "client.py"
    attempt = [str(program), str(paths.attempt(1).root)]
    again = subprocess.run(
        [sys.executable, *attempt, "--client", client, "--scratch", str(scratch)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "the losses equal the recorded ones"

    process = start(*local(tiny, killed, *options(*TWO)), log=log)
    large = [RunPaths(root=killed).round(1).checkpoint(c) for c in tiers if tiers[c] == "large"]
    wait_until(lambda: any(path.exists() for path in large), 200)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)
    assert set(states(killed)) == {"0000"}
    # every client in processes of its own: an execution key changes no bit
    resumed = fedllm("resume", killed, *options("training.zero.restart_after_clients=1"))
    assert resumed.returncode == 0, resumed.stderr
    assert states(killed) == states(undisturbed)
    logs = "".join(path.read_text() for path in (killed / "logs").rglob("*.log"))
    assert "new processes go on, after 1 client" in logs
    assert not RunPaths(root=killed).round(1).attempt(2).task_errors()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_killed_process_is_named_and_another_one_goes_on_with_the_one_that_is_left(
    tiny: Tiny, tmp_path: Path
) -> None:
    root, log = tmp_path / "run", tmp_path / "log"
    zero = ("training.engine=zero", "training.processes=2", "training.max_steps=20")
    more = ("training.checkpoint_every_minutes=1e-9", "training.epochs=9", "evaluation.every=0")
    short = ("rounds=1", "clients.cohort.count=1", "scheduler.workers=1")
    process = start(*local(tiny, root, *options(*zero, *more, *short)), log=log)
    paths = RunPaths(root=root).round(1)
    wait_until(lambda: list(paths.checkpoints.rglob("*.safetensors")), 200)
    max(workers_of(process.pid), key=lambda worker: worker.create_time()).kill()
    assert process.wait(200) == 0, log.read_text()
    assert "process 1 of 2 ended first; log " in log.read_text()
    # the process that is left has divided a base before, the new one has not
    assert paths.attempt(2).root.exists()
    assert not paths.attempt(3).root.exists()


@pytest.mark.slow
def test_processes_that_divide_the_base_score_together_as_one_does(
    tiny: Tiny, tmp_path: Path
) -> None:
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    zero = ("training.engine=zero", "training.processes=2", "training.learning_rate=0.05")
    short = ("rounds=1", "clients.cohort.count=1", "scheduler.workers=1")
    done = fedllm(*local(tiny, run, *options(*zero, *short, "clients.unseen=2")))
    assert done.returncode == 0, done.stderr
    paths = RunPaths(root=run).round(1)
    recorded = EvaluationRecord.read(paths.evaluation_record)
    submitted = SubmissionRecord.read(paths.evaluation_job(1).submission)
    assert submitted.arrays[0].processes == 2

    again = fedllm("evaluate", run, "--json")
    assert again.returncode == 0, again.stderr
    assert EvaluationRecord.model_validate_json(again.stdout).clients == recorded.clients

    exported = fedllm("export", run, "--out", adapter)
    assert exported.returncode == 0, exported.stderr
    plain = options("clients.unseen=2", "evaluation.complete_at_end=false")
    alone = in_process("evaluate", adapter, "--config", tiny.config, *plain, "--json")
    assert alone.returncode == 0, alone.stderr
    expected = EvaluationRecord.model_validate_json(alone.stdout)
    assert len(expected.clients) == len(recorded.clients) > 1
    for found, one in zip(recorded.clients, expected.clients, strict=True):
        assert found.client == one.client
        assert found.at_largest_rank.loss == pytest.approx(one.at_largest_rank.loss, rel=1e-5)
        assert found.at_largest_rank.rouge_l == one.at_largest_rank.rouge_l


def test_tasks_of_several_processes_are_planned_and_refused_inline(
    tiny: Tiny, tmp_path: Path
) -> None:
    changes = options("training.engine=zero", "training.processes=2")
    planned = in_process("plan", tiny.config, *changes, "--set", "scheduler.kind=local")
    assert planned.returncode == 0, planned.stderr
    assert "what a process of each tier needs at least" in planned.stdout
    rows = [line.split() for line in planned.stdout.splitlines() if " 3 * " in line]
    (row,) = (row for row in rows if row[0] == "small")
    assert row[:6] == ["small", "zero", "3", "*", "1", "2"]
    small = options("scheduler.kind=local", "clients.tiers.large.memory_gib=1e-6")
    too_large = in_process("plan", tiny.config, *changes, *small)
    assert too_large.returncode == 2
    line = too_large.stderr.splitlines()[-1]
    assert "clients.tiers.large.memory_gib: got 1e-06, but a process needs" in line
    adds = options("scheduler.kind=local", "method.name=flora")
    changed = in_process("plan", tiny.config, *changes, *adds)
    assert changed.returncode == 2
    line = changed.stderr.splitlines()[-1]
    assert "training.zero.stage: got 3, which divides the base, but method.name flora" in line
    refused = one_line(in_process("run", tiny.config, "--run-dir", tmp_path / "run", *changes))
    assert "scheduler.kind: inline runs a task in one process" in refused
    over = options("scheduler.kind=local", "training.nodes=2")
    there = one_line(in_process("run", tiny.config, "--run-dir", tmp_path / "run", *changes, *over))
    assert "scheduler.kind: local runs on this node" in there
    assert not (tmp_path / "run" / "rounds").exists()
