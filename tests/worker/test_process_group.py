"""Workers of several processes: they claim and publish once, stop and resume together."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.errors import ProcessLost, UserError
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths, RunPaths
from fedllm.storage.records import ClaimRecord, ErrorRecord, TaskRecord, UpdateRecord
from fedllm.worker.client_training import ClientRound
from fedllm.worker.meeting import address_of, call_first, listen, receive_others
from fedllm.worker.worker import STOPPED
from tests.training.processes import run_together
from tests.worker.attempts import (
    ME,
    assert_same_bits,
    change_config,
    cohort,
    round_of,
    untrained,
    updates,
)
from tests.worker.client_program import LongRows
from tests.worker.halves import PAUSE

HALVES = Path(__file__).with_name("halves.py")
PLAIN = Path(__file__).parents[2] / "jobs" / "client.py"
TASK = "7_1"
PATIENCE_SECONDS = 120.0

Worker = list["subprocess.Popen[bytes]"]


@contextmanager
def worker(
    attempt: AttemptPaths, *, program: Path = HALVES, pause: float = 0.0, port: int | None = None
) -> Iterator[Worker]:
    """Start both processes of a task."""
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
    processes = []
    for rank in range(2):
        own = {
            **{"FEDLLM_TASK": TASK, "FEDLLM_PROCESSES": "2", "FEDLLM_RANK": str(rank)},
            **{"FEDLLM_RENDEZVOUS": f"127.0.0.1:{port}", PAUSE: str(pause)},
            "FEDLLM_LOG": str(attempt.run.root / "worker_%t.log"),
        }
        with (attempt.run.root / f"worker_{rank}.log").open("ab") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(program), str(attempt.root)],
                    env={**os.environ, **own},
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ended(processes: Worker) -> list[int]:
    return [process.wait(PATIENCE_SECONDS) for process in processes]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def log_of(attempt: AttemptPaths, rank: int) -> str:
    return (attempt.run.root / f"worker_{rank}.log").read_text()


def prepared(attempt: AttemptPaths) -> AttemptPaths:
    """An attempt whose steps have a pass for every row."""
    change_config(attempt, "training", micro_batch_size=1, checkpoint_every_minutes=1e-9)
    return attempt


@pytest.fixture(scope="module")
def halved(done: Path, tmp_path_factory: pytest.TempPathFactory) -> AttemptPaths:
    """A round that a worker of two processes has trained, whose port a silent program had."""
    root = tmp_path_factory.mktemp("halved") / "run"
    shutil.copytree(done, root)
    attempt = prepared(untrained(RunPaths(root=root).round(1)))
    with (
        socket.create_server(("", 0)) as other,
        worker(attempt, port=other.getsockname()[1]) as processes,
    ):
        assert ended(processes) == [0, 0], log_of(attempt, 0) + log_of(attempt, 1)
    return attempt


@pytest.mark.slow
def test_two_processes_claim_report_and_publish_as_one(halved: AttemptPaths, done: Path) -> None:
    recorded = updates(RunPaths(root=done).round(1))
    found = updates(round_of(halved))
    assert found.keys() == recorded.keys()
    for client, (record, _) in found.items():
        assert record.losses == pytest.approx(recorded[client][0].losses, rel=1e-4)
        assert (record.rows, record.tokens) == (
            recorded[client][0].rows,
            recorded[client][0].tokens,
        )
        assert (record.task, record.environment["processes"]) == (TASK, "2")
    claims = [ClaimRecord.read(path) for path in halved.claim_files()]
    assert {claim.task for claim in claims} == {TASK}
    (task,) = halved.tasks.rglob("*.json")
    assert TaskRecord.read(task).clients_done == len(found)
    assert not halved.task_errors()
    # the others say nothing
    assert all(f"client {client}: " in log_of(halved, 0) for client in found)
    assert log_of(halved, 1) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGTERM, (0, 1)), pytest.param(signal.SIGUSR2, (1,), marks=pytest.mark.nightly)],
)
def test_a_signal_stops_both_between_two_steps_and_the_task_goes_on_with_the_same_bits(
    attempt: AttemptPaths, halved: AttemptPaths, number: int, ranks: tuple[int, ...]
) -> None:
    prepared(attempt)
    paths = round_of(attempt)
    with worker(attempt, pause=0.3) as processes:
        until(lambda: list(paths.checkpoints.rglob("*.safetensors")))
        for rank in ranks:
            processes[rank].send_signal(number)
        assert ended(processes) == [STOPPED, STOPPED], log_of(attempt, 0) + log_of(attempt, 1)
    assert f"{TASK}: stopped by {signal.Signals(number).name}" in log_of(attempt, 0)
    assert list(paths.checkpoints.rglob("*.safetensors"))
    with worker(attempt) as processes:
        assert ended(processes) == [0, 0], log_of(attempt, 0) + log_of(attempt, 1)
    assert_same_bits(paths, halved.run.root)
    resumed = [record.resumed_at for record, _ in updates(paths).values() if record.resumed_at]
    assert len(resumed) == 1
    assert TaskRecord.read(attempt.task(TASK)).starts == 2


@pytest.mark.slow
def test_new_processes_take_the_place_of_old_ones_and_go_on_to_the_same_bits(
    attempt: AttemptPaths, halved: AttemptPaths
) -> None:
    prepared(attempt)
    change_config(attempt, "training", zero={"restart_after_clients": 2})
    paths = round_of(attempt)
    with worker(attempt) as processes:
        assert ended(processes) == [0, 0], log_of(attempt, 0) + log_of(attempt, 1)
    assert log_of(attempt, 0).count(f"{TASK}: new processes go on, after 2 clients") == 1
    assert_same_bits(paths, halved.run.root)
    (record,) = map(TaskRecord.read, attempt.tasks.rglob("*.json"))
    assert (record.starts, record.clients_done) == (1, len(updates(paths)))
    assert record.earlier_allocated_seconds == 0
    assert record.startup_seconds + record.busy_seconds < record.allocated_seconds
    assert log_of(attempt, 1) == ""
    assert not attempt.task_errors()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_which_names_its_log(
    attempt: AttemptPaths,
) -> None:
    prepared(attempt)
    with worker(attempt, pause=0.3) as processes:
        until(lambda: list(round_of(attempt).checkpoints.rglob("*.safetensors")))
        processes[0].kill()
        assert ended(processes)[1] == 1
    (record,) = map(ErrorRecord.read, attempt.task_errors())
    assert record.kind == "ProcessLost"
    assert record.message == f"{TASK}: process 0 of 2 ended first"
    assert record.log.endswith("worker_0.log")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_process_that_hangs_ends_the_other_in_time_which_names_its_log(
    attempt: AttemptPaths, stopped: int
) -> None:
    prepared(attempt)
    change_config(attempt, "scheduler", hung_minutes=0.2)
    with worker(attempt, pause=0.3) as processes:
        until(lambda: list(round_of(attempt).checkpoints.rglob("*.safetensors")))
        processes[stopped].send_signal(signal.SIGSTOP)
        assert processes[1 - stopped].wait(PATIENCE_SECONDS) == 1
    (record,) = map(ErrorRecord.read, attempt.task_errors())
    assert record.kind == "ProcessLost"
    what = ("does not answer", "kept the others waiting")[stopped]
    assert record.message == f"{TASK}: process {stopped} of 2 {what}"
    assert record.log.endswith(f"worker_{stopped}.log")


def test_a_process_alone_says_who_did_not_come_and_where_they_were_to_meet() -> None:
    identity = TaskIdentity(
        task="7_1", node="n", log="", num_processes=3, rendezvous="127.0.0.1:29999"
    )
    with listen(identity.rendezvous) as server, pytest.raises(ProcessLost) as caught:
        receive_others(server, identity, 1, seconds=0.1)
    assert "7_1: processes 1, 2 of 3 did not come to 127.0.0.1:29999" in str(caught.value)
    with pytest.raises(ProcessLost, match="process 1 of 3 did not find the first one at 127"):
        call_first(replace(identity, rank=1), seconds=0.1)


@pytest.mark.parametrize("rendezvous", ["", "node", "node:", ":1", "node:70000"])
def test_a_place_to_meet_that_is_missing_is_named(rendezvous: str) -> None:
    with pytest.raises(UserError, match=r"FEDLLM_RENDEZVOUS: got .* set it to HOST:PORT"):
        address_of(rendezvous)


@pytest.mark.slow
@pytest.mark.nightly
def test_where_memory_runs_out_in_one_process_all_begin_again_with_smaller_micro_batches(
    attempt: AttemptPaths, tmp_path: Path
) -> None:
    eight = {"batch_size": 8, "micro_batch_size": None, "max_steps": 2, "epochs": 2}
    zero = {"engine": "zero", "processes": 2, "zero": {"stage": 2}}
    change_config(attempt, "training", **eight, **zero, smaller_micro_batch=True)
    client, out = cohort(attempt)[0], tmp_path / "record"
    said = run_together(
        "tests.worker.short_memory", (attempt.root, client, out), processes=2, log=out, says=True
    )
    record = UpdateRecord.model_validate_json(out.read_text())
    message = f"client {client}: memory ran out with micro-batches of 8 rows"
    assert said.startswith(f"{message}; it is trained again from its start with 4\n")
    assert said.endswith(f"from its start with {record.micro_batch_size}\n")
    assert (record.status, record.steps, record.rows) == ("ok", 2, 8)

    change_config(attempt, "training", engine="plain", processes=1, micro_batch_size=1)
    opened = ClientRound.open(attempt, LongRows())
    (alone,) = opened.train([client], attempt=1, bundle=0, identity=ME, resume=False)
    assert record.losses == pytest.approx(alone.record.losses, rel=1e-4)


def test_a_trainer_of_one_process_refuses_a_task_of_two_and_says_so_first(
    attempt: AttemptPaths,
) -> None:
    with worker(attempt, program=PLAIN) as processes:
        assert ended(processes) == [2, 1]
    (record,) = map(ErrorRecord.read, attempt.task_errors())
    assert record.message.startswith(f"{TASK}: a task of 2 processes; the trainer of tier")
    assert "Traceback" not in log_of(attempt, 0) + log_of(attempt, 1)


def test_a_signal_to_another_process_counts_as_one_to_this_process() -> None:
    with StopSignals() as here, StopSignals() as there:
        os.kill(os.getpid(), signal.SIGUSR2)
        here.hear(there.flags)
        assert (here.came, here.only_warned, here.name) == (True, True, "SIGUSR2")
        assert not any(here.flags)
        os.kill(os.getpid(), signal.SIGTERM)
        here.hear(there.flags)
        assert not here.only_warned
