"""Commands that read runs and plans: status, watching, pruning, plans, logs."""

import json
import os
import pty
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from fedllm.config.loading import dump_config, read_config
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import RoundRecord
from fedllm.storage.tensors import publish_update
from tests.cli.commands import FEDLLM, in_process, one_line, wait_until
from tests.reporting.runs import CLIENTS, begin, claim, draw, prepare
from tests.rounds.simulation import Simulation, complete, config_of, states
from tests.storage.samples import record_of
from tests.storage.updates import publish
from tests.tiny import Tiny


@pytest.fixture
def training(tmp_path: Path) -> RunPaths:
    """A run of one round whose clients train."""
    paths = begin(tmp_path / "run", rounds=1)
    prepare(paths)
    RoundRecord(round=0, lease=1, state_sha256="", clients=0).publish(paths.round(0).record)
    draw(paths, 1)
    claim(paths, 1, 1, 0, task="local-1", log="/logs/worker")
    return paths


def finish(paths: RunPaths) -> None:
    RoundRecord(round=1, lease=1, state_sha256="", clients=4).publish(paths.round(1).record)


def test_status_names_tasks_failures_and_how_to_go_on(training: RunPaths) -> None:
    publish(training.round(1), CLIENTS[1], bundle=1, run_id="run", round=1)
    failed = record_of(CLIENTS[2], run_id="run", round=1, status="failed", reason="loss is nan")
    publish_update(training.round(1).update(attempt=1, bundle=2, part=0), [failed], {})
    shown = in_process("status", training.root)
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert lines[:2] == ["run run: stopped, 0 of 1 round", "coordinator: none"]
    assert "round 1: train; 1 of 4 clients published, 0 at work, 2 waiting, 1 failed" in lines
    assert f"  failed {CLIENTS[2]}: loss is nan" in lines
    # nobody works at it: it has no speed
    assert "clients/min" not in shown.stdout
    assert "  1 task ended before all was published; to train again: 1 client" in lines
    assert lines[-1] == f"go on with: fedllm resume {training.root}"


def test_status_without_a_run_lists_those_below_runs(
    training: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(training.root.parent)
    assert in_process("status").stdout == "no run below runs/; start one with: fedllm run CONFIG\n"
    Path("runs").mkdir()
    training.root.rename(Path("runs") / "mine")
    shown = in_process("status").stdout
    assert shown.startswith("runs/mine: run run: stopped, 0 of 1 round; round 1: train; ")


def test_a_configuration_is_no_run_also_if_it_is_one_shipped_with_fedllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(in_process("status", "configs/quickstart.yaml"))
    assert "a configuration, but this command needs a run directory" in line
    assert line.endswith("`fedllm run` starts its run, in runs/quickstart")


def test_status_as_json_has_names_that_scripts_can_rely_on(training: RunPaths) -> None:
    found = json.loads(in_process("status", training.root, "--json").stdout)
    assert found.keys() == {
        *("run_id", "state", "coordinator", "rounds", "rounds_done", "prepared", "current"),
        *("evaluating", "recent", "estimate", "task_hours", "gpu_hours", "array_efficiency"),
        *("queue", "training", "results", "failure", "jobs", "history"),
    }
    assert found["current"]["tasks"][0]["log"] == "/logs/worker"
    assert found["current"]["pace"].keys() >= {"clients_per_minute", "tokens_per_second"}
    assert "--watch" in one_line(in_process("status", training.root, "--watch", "--json"))


def test_watching_in_a_log_tells_changes_in_lines_and_ends_with_the_run(
    training: RunPaths, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as out:
        watcher = subprocess.Popen([FEDLLM, "status", training.root, "--watch"], stdout=out)
    wait_until(lambda: "0 of 4 clients" in log.read_text())
    publish(training.round(1), CLIENTS[1], bundle=1, run_id="run", round=1)
    wait_until(lambda: "1 of 4 clients" in log.read_text())
    finish(training)
    assert watcher.wait(timeout=30) == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    assert lines[-1].endswith("run run: done, 1 of 1 round")
    assert "\x1b" not in log.read_text()


def test_watching_on_a_terminal_redraws_and_ends_orderly_by_ctrl_c(training: RunPaths) -> None:
    ours, theirs = pty.openpty()
    watcher = subprocess.Popen(
        [FEDLLM, "status", training.root, "--watch"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
        # a shell starts its background jobs, and so these tests, with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    shown = bytearray()

    def read() -> None:
        # on Linux a read fails once the other side of the terminal is closed
        try:
            while block := os.read(ours, 4096):
                shown.extend(block)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: b"0 of 4 clients published" in shown)
    publish(training.round(1), CLIENTS[1], bundle=1, run_id="run", round=1)
    wait_until(lambda: b"1 of 4 clients published" in shown)
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(timeout=30) == 0
    reader.join(timeout=10)
    os.close(ours)
    assert b"\x1b[" in shown
    assert b"Traceback" not in shown


def test_prune_tells_what_would_go_then_removes_it_and_the_run_stays_whole(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    config = config_of(rounds=5, storage__keep_states=5, storage__keep_logs=5)
    complete(root, Simulation(), config)
    paths = RunPaths(root=root)
    assert in_process("prune", root).stdout == "nothing to remove\n"
    storage = config.storage.model_copy(update={"keep_states": 1, "keep_logs": 1})
    paths.config.write_text(dump_config(config.model_copy(update={"storage": storage})))
    assert read_config(paths.config).storage.keep_states == 1
    before = states(root)
    told = in_process("prune", root, "--dry-run")
    assert told.returncode == 0
    assert states(root) == before
    lines = told.stdout.splitlines()
    assert any(line.startswith("would remove rounds/0003/aggregate/global") for line in lines)
    assert any(line.startswith("would remove rounds/0004/attempts/01/claims (") for line in lines)
    assert lines[-1].endswith("in all")
    removed = json.loads(in_process("prune", root, "--json").stdout)
    assert removed["bytes"] == sum(gone["bytes"] for gone in removed["removed"]) > 0
    assert all(not Path(gone["path"]).exists() for gone in removed["removed"])
    assert set(states(root)) == {"0000", "0005"}
    shown = json.loads(in_process("status", root, "--json").stdout)
    assert (shown["state"], shown["rounds_done"]) == ("done", 5)
    assert len(paths.metrics.read_text().splitlines()) == 6
    assert in_process("logs", root).returncode == 0
    line = one_line(in_process("logs", root, "--client", "nobody"))
    assert "storage.keep_logs" in line
    complete(root, Simulation(), config_of(rounds=6))
    assert "0006" in states(root)


def test_the_states_that_a_pruned_run_keeps_are_exported(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    done = in_process(
        "run", tiny.config, "--run-dir", root, "--set", "evaluation.every=0", "--set", "rounds=3",
        "--set", "storage.keep_states=1", "--set", "storage.keep_logs=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert in_process("prune", root).returncode == 0
    exported = in_process("export", root, "--round", "3", "--out", tmp_path / "adapter")
    assert exported.returncode == 0, exported.stderr
    pruned = in_process("export", root, "--round", "2", "--out", tmp_path / "other")
    assert "pruned" in one_line(pruned)


def test_a_plan_without_a_cluster_says_so_and_writes_the_files(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    words = ("--set", "scheduler.kind=slurm", "--set", "scheduler.sbatch.client.mem=3G")
    began = time.monotonic()
    shown = in_process("plan", tiny.config, *words, "--out", out, "--slots", "2")
    assert shown.returncode == 0, shown.stderr
    assert time.monotonic() - began < 60
    assert "limits unknown" in shown.stdout
    assert "--mem=3G --nodes=1 --ntasks=1 --open-mode=append --requeue" in shown.stdout
    written = sorted(path.name for path in out.iterdir())
    assert [name.split("-")[1] for name in written] == ["prepare", "aggregate", "evaluate", "train"]
    again = in_process("plan", tiny.config, *words, "--json")
    found = json.loads(again.stdout)
    assert found["cohort"] == 4
    assert found["arrays"][0]["options"]["mem"] == "3G"
    assert {job["kind"] for job in found["jobs"]} == {
        *("prepare", "coordinator", "aggregate", "evaluate"),
    }
    assert found["jobs"][1]["options"]["signal"].startswith("B:USR2@")


def test_a_plan_of_local_workers_has_no_sbatch_files(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "plan"
    shown = in_process("plan", tiny.config, "--set", "scheduler.kind=local", "--out", out)
    assert shown.returncode == 0, shown.stderr
    assert "sbatch" not in shown.stdout
    assert not out.exists()


def test_a_command_whose_output_nobody_reads_ends_with_0() -> None:
    with subprocess.Popen(
        [FEDLLM, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, b"")
