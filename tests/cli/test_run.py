"""Runs as a user starts them: on this machine, killed, resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.records import CollectionRecord, EvaluationRecord
from tests.cli.commands import FEDLLM, fedllm, in_process, one_line, start, wait_until
from tests.rounds.simulation import states
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An inline run without any interruption."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    done = in_process("run", tiny.config, "--run-dir", root)
    assert done.returncode == 0, done.stderr
    return root


def local(tiny: Tiny, root: Path, *more: str) -> list[object]:
    """Return the arguments of a run with two local workers."""
    return ["run", tiny.config, "--run-dir", root, "--set", "scheduler.kind=local", *more]


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the resident workers of a coordinator."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if "fedllm.programs.serve" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def updates(root: Path, round_number: int) -> list[Path]:
    """Return the published update files of a round."""
    return sorted(RunPaths(root=root).round(round_number).updates.glob("[0-9]*.safetensors"))


def test_a_run_trains_and_scores_clients_with_any_id(undisturbed: Path) -> None:
    paths = RunPaths(root=undisturbed)
    collection = CollectionRecord.read(paths.round(1).collection)
    assert len(collection.updates) == 4
    base = EvaluationRecord.read(paths.round(0).evaluation_record)
    last = EvaluationRecord.read(paths.round(2).evaluation_record)
    assert {client.client for client in base.clients} == {c.client for c in last.clients}
    assert any("🦊" in client.client for client in base.clients)


def test_training_lowers_the_answer_loss(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_local_workers_give_the_bits_of_an_inline_run_though_nobody_reads_its_lines(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = [FEDLLM, *map(str, local(tiny, tmp_path / "run"))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        # as `| head -1`
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert not errors
    assert states(tmp_path / "run") == states(undisturbed)


def test_the_round_that_dev_clients_like_best_is_exported(
    undisturbed: Path, tmp_path: Path
) -> None:
    records = {
        number: EvaluationRecord.read(RunPaths(root=undisturbed).round(number).evaluation_record)
        for number in range(3)
    }
    losses = {
        number: sum(c.as_deployed.loss for c in record.clients if c.group == "dev")
        for number, record in records.items()
    }
    best = min(losses, key=lambda number: losses[number])
    done = in_process("export", undisturbed, "--round", "best", "--out", tmp_path / "a", "--json")
    assert json.loads(done.stdout)["round"] == best
    line = one_line(in_process("export", undisturbed, "--round", "last", "--out", tmp_path / "b"))
    assert "--round: got last, need a number or best" in line


def test_running_again_does_nothing(tiny: Tiny, undisturbed: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.glob("rounds/**/*") if p.is_file()}
    done = in_process("run", tiny.config, "--run-dir", undisturbed)
    assert done.returncode == 0
    after = {p: p.stat().st_mtime_ns for p in undisturbed.glob("rounds/**/*") if p.is_file()}
    assert before == after


def test_a_killed_coordinator_takes_its_workers_along_and_the_run_resumes_to_the_same_bits(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    process = start(*local(tiny, root), log=tmp_path / "log")
    wait_until(lambda: updates(root, 1))
    workers = workers_of(process.pid)
    process.kill()
    process.wait()
    psutil.wait_procs(workers, timeout=10)
    assert workers
    assert not any(worker.is_running() for worker in workers)
    done = in_process("resume", root)
    assert done.returncode == 0, done.stderr
    assert states(root) == states(undisturbed)


def test_a_killed_worker_is_replaced_and_its_clients_train_again(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    process = start(*local(tiny, root), log=tmp_path / "log")
    wait_until(lambda: list(RunPaths(root=root).round(1).attempt(1).claims.glob("*.json")))
    for worker in workers_of(process.pid):
        worker.kill()
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert states(root) == states(undisturbed)


def test_a_second_coordinator_refuses_and_names_the_first(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = start(*local(tiny, root, "--set", "rounds=50"), log=tmp_path / "log")
    try:
        wait_until(lambda: updates(root, 1))
        message = one_line(in_process("resume", root))
        assert f"pid {process.pid}" in message
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 3


def test_cancel_stops_the_coordinator_and_its_workers(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = start(*local(tiny, root, "--set", "rounds=50"), log=tmp_path / "log")
    wait_until(lambda: updates(root, 1))
    workers = workers_of(process.pid)
    assert fedllm("cancel", root).returncode == 0
    assert process.wait(30) == 3
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
    assert "stopped" in in_process("status", root).stdout


def test_advance_by_hand_gives_the_same_bits(tiny: Tiny, undisturbed: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = start(*local(tiny, root), log=tmp_path / "log")
    wait_until(lambda: (root / "run.json").exists())
    process.kill()
    process.wait()
    done = in_process("resume", root, "--set", "scheduler.kind=inline", "--set", "rounds=2")
    assert done.returncode == 0, done.stderr
    assert in_process("advance", root).returncode == 0
    assert states(root) == states(undisturbed)


def test_status_and_logs_tell_where_a_client_trained(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert fedllm(*local(tiny, root)).returncode == 0
    status = json.loads(in_process("status", root, "--json").stdout)
    assert (status["state"], status["rounds_done"]) == ("done", 2)
    collection = CollectionRecord.read(RunPaths(root=root).round(2).collection)
    shown = in_process("logs", root, "--client", collection.updates[0].client)
    assert "worker-" in shown.stdout
    assert shown.returncode == 0


def test_one_client_replayed_by_hand_reproduces_its_recorded_losses(
    undisturbed: Path, tmp_path: Path
) -> None:
    paths = RunPaths(root=undisturbed).round(2)
    client = CollectionRecord.read(paths.collection).updates[0].client
    command = [sys.executable, str(shipped("jobs/client.py")), str(paths.attempt(1).root)]
    command += ["--client", client, "--scratch", str(tmp_path / "scratch")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the losses equal the recorded ones" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_exit_3_and_the_run_goes_on_after_space_is_made(
    tiny: Tiny, undisturbed: Path, tmp_path: Path
) -> None:
    place, log = tmp_path / "small", tmp_path / "log"
    place.mkdir()
    script = f"""
        set -e
        mount -t tmpfs -o size=200k tmpfs {place}
        set +e
        fedllm run {tiny.config} --run-dir {place}/run; echo "full $?"
        mount -o remount,size=50m {place}
        fedllm resume {place}/run; echo "resumed $?"
        cp -r {place}/run {tmp_path}/kept
    """
    environment = {**os.environ, "PATH": f"{Path(FEDLLM).parent}:{os.environ['PATH']}"}
    with log.open("w") as out:
        subprocess.run(
            ["unshare", "-m", "bash", "-c", script],
            stdout=out,
            stderr=subprocess.STDOUT,
            check=True,
            env=environment,
        )
    said = log.read_text()
    assert "full 3" in said, said
    assert "no space left on device; make space, then resume the run" in said
    assert "resumed 0" in said, said
    assert states(tmp_path / "kept") == states(undisturbed)


def test_status_of_a_diverged_run_names_the_key_and_that_a_new_run_is_needed(
    tiny: Tiny, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    failed = in_process(
        *("run", tiny.config, "--run-dir", root),
        *("--set", "training.learning_rate=1e30", "--set", "evaluation.every=0"),
        *("--set", "clients.cohort.count=2"),
    )
    assert failed.returncode == 1
    status = in_process("status", root)
    assert status.returncode == 1
    assert "failed in train of round 1" in status.stdout
    assert "training.learning_rate 1e+30 is too high" in status.stdout
    assert "begin a new run" in status.stdout
    found = json.loads(in_process("status", root, "--json").stdout)
    assert (found["state"], found["failure"]["round"]) == ("failed", 1)
