"""Workers train the clients without an update; its bits depend on round and client alone."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedllm.data.cache import TokenizedClients
from fedllm.errors import RunDirectoryError, UserError
from fedllm.process.session import Session, layout_of
from fedllm.programs.entry_points import run as run_program
from fedllm.storage.paths import AttemptPaths, RunPaths, shipped
from fedllm.storage.records import (
    CohortRecord,
    ErrorRecord,
    LayoutRecord,
    PreparedRecord,
    SubmissionRecord,
    TaskRecord,
)
from fedllm.worker.client_training import ClientRound
from fedllm.worker.heartbeat import Heartbeat
from fedllm.worker.replay import replay
from fedllm.worker.worker import STOPPED, work
from tests.planning.federations import prepared_of
from tests.worker.attempts import (
    ME,
    OTHER,
    alone,
    assert_same_bits,
    change_config,
    cohort,
    files,
    plan,
    round_of,
    updates,
)


def test_bits_do_not_depend_on_bundles_order_or_process(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    first, *others = cohort(attempt)
    plan(attempt, [[first], others[::-1]])
    assert work(attempt, None, ME, session) == 0
    # the costlier bundle was taken first
    assert files(attempt) == ["01-000-00.safetensors", "01-001-00.safetensors"]
    assert_same_bits(round_of(attempt), done)


def test_the_program_runs_by_hand_from_anywhere(
    attempt: AttemptPaths, done: Path, tmp_path: Path
) -> None:
    program = [sys.executable, str(shipped("jobs/client.py")), str(attempt.root)]
    assert subprocess.run(program, cwd=tmp_path, check=True).returncode == 0
    assert_same_bits(round_of(attempt), done)


def test_a_duplicate_worker_finds_nothing_to_do(attempt: AttemptPaths, session: Session) -> None:
    work(attempt, None, ME, session)
    before = {path: path.stat().st_mtime_ns for path in round_of(attempt).updates.iterdir()}
    assert work(attempt, None, OTHER, session) == 0
    assert work(attempt, None, ME, session) == 0
    after = {path: path.stat().st_mtime_ns for path in round_of(attempt).updates.iterdir()}
    assert after == before


def test_a_worker_takes_bundles_of_its_class_only(attempt: AttemptPaths, session: Session) -> None:
    clients = cohort(attempt)
    plan(attempt, [clients[:1]], worker_class="large")
    with pytest.raises(UserError, match="no bundle of class small; need one of large"):
        work(attempt, "small", ME, session)
    assert work(attempt, "large", ME, session) == 0
    assert set(updates(round_of(attempt))) == set(clients[:1])


def test_only_the_claiming_task_goes_on_with_its_bundle(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    clients = cohort(attempt)
    plan(attempt, [clients])
    assert stopped_after(attempt, session, 2) == STOPPED
    assert work(attempt, None, OTHER, session) == 0
    assert files(attempt) == ["01-000-00.safetensors"]
    assert work(attempt, None, ME, session) == 0
    assert files(attempt) == ["01-000-00.safetensors", "01-000-01.safetensors"]
    assert_same_bits(round_of(attempt), done)


class Interrupting(Session):
    """A session in which a signal comes when the data of client number `limit` are read."""

    def __init__(self, limit: int, number: int) -> None:
        super().__init__()
        self.limit, self.number = limit, number

    def data(self, prepared: PreparedRecord) -> TokenizedClients:
        """Return the data; the signal comes while a client is about to train."""
        self.limit -= 1
        if self.limit < 0:
            os.kill(os.getpid(), self.number)
        return super().data(prepared)


def stopped_after(
    attempt: AttemptPaths, session: Session, clients: int, number: int = signal.SIGTERM
) -> int:
    del session
    return work(attempt, None, ME, Interrupting(clients, number))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_finished_clients_are_published_when_a_signal_comes(
    attempt: AttemptPaths, done: Path, session: Session, number: int
) -> None:
    clients = cohort(attempt)
    plan(attempt, [clients])
    before = signal.getsignal(number)
    assert stopped_after(attempt, session, 2, number) == STOPPED
    assert signal.getsignal(number) is before
    assert_same_bits(round_of(attempt), done, clients[:2])
    # an end by a signal is no error
    assert not attempt.task_errors()


def test_a_signal_reaches_the_callers_own_handler_afterwards(
    attempt: AttemptPaths, session: Session
) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        stopped_after(attempt, session, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_published_clients_do_not_train_in_a_later_attempt(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    clients = cohort(attempt)
    plan(attempt, [clients[:2]])
    work(attempt, None, ME, session)
    later = round_of(attempt).attempt(2)
    SubmissionRecord.read(attempt.submission).publish(later.submission)
    plan(later, [clients])
    work(later, None, OTHER, session)
    assert_same_bits(round_of(attempt), done)
    attempts = {client: record.attempt for client, (record, _) in updates(round_of(later)).items()}
    assert [attempts[client] for client in clients] == [1, 1, 2, 2]


def test_long_bundles_are_published_in_parts(attempt: AttemptPaths, session: Session) -> None:
    change_config(attempt, "training", checkpoint_every_minutes=1e-9)
    plan(attempt, [cohort(attempt)[:3]])
    work(attempt, None, ME, session)
    assert files(attempt) == [f"01-000-{part:02d}.safetensors" for part in range(3)]


def test_adapters_that_take_much_memory_are_published_as_they_come(
    attempt: AttemptPaths, done: Path
) -> None:
    clients = cohort(attempt)
    plan(attempt, [clients])
    work(attempt, None, ME, Session(held_bytes=1))
    assert files(attempt) == [f"01-000-{part:02}.safetensors" for part in range(len(clients))]
    assert_same_bits(round_of(attempt), done)


def test_adapters_that_are_not_kept_are_made_again(attempt: AttemptPaths, done: Path) -> None:
    plan(attempt, [cohort(attempt)])
    work(attempt, None, ME, Session(kept_bytes=0))
    assert_same_bits(round_of(attempt), done)


def test_an_update_that_cannot_be_written_is_an_error(
    attempt: AttemptPaths, session: Session
) -> None:
    round_of(attempt).updates.write_text("in the way")
    with pytest.raises(RunDirectoryError, match="updates"):
        work(attempt, None, ME, session)


def test_the_record_of_a_task_counts_all_its_starts(
    attempt: AttemptPaths, session: Session
) -> None:
    clients = cohort(attempt)
    plan(attempt, [clients])
    assert stopped_after(attempt, session, 2) == STOPPED
    first = TaskRecord.read(attempt.task(ME.task))
    assert (first.task, first.state, first.clients_done, first.starts) == (ME.task, "ended", 2, 1)
    assert 0 < first.startup_seconds < first.allocated_seconds - first.busy_seconds
    # the same task, requeued
    assert work(attempt, None, ME, session) == 0
    second = TaskRecord.read(attempt.task(ME.task))
    assert (second.state, second.clients_done, second.starts) == ("ended", len(clients), 2)
    assert second.earlier_busy_seconds == first.busy_seconds > 0
    assert second.earlier_allocated_seconds == first.allocated_seconds


def test_the_record_names_client_and_step_while_a_client_trains(attempt: AttemptPaths) -> None:
    heartbeat = Heartbeat.open(attempt, ME, "small", began=time.monotonic(), first=0.0)
    heartbeat = dataclasses.replace(heartbeat, every_seconds=0.0)
    with heartbeat.clients(["a/b", "c, d"], 1):
        heartbeat.step(0)
        one = TaskRecord.read(attempt.task(ME.task))
        heartbeat.step(1)
    two = TaskRecord.read(attempt.task(ME.task))
    assert (two.client, two.step, two.state, two.clients_done) == ("a/b", 1, "training", 0)
    assert two.clients == ["a/b", "c, d"]
    assert (two.worker_class, two.node) == ("small", ME.node)
    assert one != two


def test_a_damaged_state_is_named_and_recorded(
    attempt: AttemptPaths, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(attempt, [cohort(attempt)])
    state = attempt.run.round(0).global_state
    state.write_bytes(state.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunDirectoryError, match=r"global\.safetensors: damaged"):
        work(attempt, None, ME, session)
    monkeypatch.setenv("FEDLLM_TASK", ME.task)
    monkeypatch.setenv("FEDLLM_LOG", ME.log)
    assert run_program("client", [str(attempt.root), "--class", "small"], session=session) == 2
    error = ErrorRecord.read(attempt.task_error(ME.task))
    assert (error.kind, error.exit_code, error.log) == ("RunDirectoryError", 2, ME.log)
    assert not files(attempt)


def test_a_file_of_another_node_may_become_visible_late(
    attempt: AttemptPaths, done: Path, session: Session
) -> None:
    change_config(attempt, "scheduler", kind="slurm")
    change_config(attempt, "storage", visibility_seconds=60)
    paths = round_of(attempt)
    hidden = paths.cohort.rename(paths.cohort.with_suffix(".hidden"))
    appears = threading.Timer(0.3, hidden.rename, [paths.cohort])
    appears.start()
    assert work(attempt, None, ME, session) == 0
    appears.join()
    assert_same_bits(paths, done)


def test_a_file_that_stays_invisible_is_missing(attempt: AttemptPaths, session: Session) -> None:
    round_of(attempt).cohort.unlink()
    with pytest.raises(RunDirectoryError, match=r"cohort\.json: missing; resume the run"):
        work(attempt, None, ME, session)


def test_a_state_that_the_cohort_was_not_drawn_from_is_named(
    attempt: AttemptPaths, session: Session
) -> None:
    cohort_file = round_of(attempt).cohort
    record = CohortRecord.read(cohort_file)
    record.model_copy(update={"state_sha256": "another"}).publish(cohort_file)
    with pytest.raises(RunDirectoryError, match="not the state that round 1 was drawn from"):
        work(attempt, None, ME, session)


@pytest.mark.parametrize(
    ("recorded", "used"),
    [(LayoutRecord(cpu="mask", cuda="packed"), "mask"), (None, "padded")],
    ids=["recorded", "of before there were layouts"],
)
def test_clients_train_in_the_recorded_layout(
    attempt: AttemptPaths, done: Path, recorded: LayoutRecord | None, used: str
) -> None:
    path = RunPaths(root=done).prepared
    prepared = PreparedRecord.read(path)
    assert prepared.layout is not None
    assert prepared.layout.cpu == "parts"
    assert CohortRecord.read(RunPaths(root=done).round(1).cohort).layout == prepared.layout
    changed = prepared.model_copy(update={"layout": recorded})
    changed.publish(attempt.run.prepared)
    client = cohort(attempt)[0]
    opened = ClientRound.open(attempt, Session())
    assert opened.session.slots(opened.config, opened.prepared).layout == used
    assert opened.settings.by_length is (recorded is not None)
    (trained,) = opened.train([client], attempt=1, bundle=0, identity=ME)
    expected, _ = updates(RunPaths(root=done).round(1))[client]
    # dropout drew other masks for the common prefix
    assert trained.record.losses == pytest.approx(expected.losses, abs=0.01)
    assert trained.record.tokens == expected.tokens


def test_a_gpu_has_a_layout_of_its_own() -> None:
    layout = LayoutRecord(cpu="parts", cuda="flex")
    prepared = prepared_of([]).model_copy(update={"layout": layout})
    assert layout_of(prepared, "cpu") == "parts"
    assert layout_of(prepared, "cuda:1") == "flex"


def test_a_divergent_client_is_published_as_failed(attempt: AttemptPaths, session: Session) -> None:
    change_config(attempt, "training", learning_rate=1e30, clip_norm=None, max_steps=4)
    change_config(attempt, "method", local="fedavg")
    plan(attempt, [cohort(attempt)[:1]])
    assert work(attempt, None, ME, session) == 0
    ((record, tensors),) = updates(round_of(attempt)).values()
    assert record.status == "failed"
    assert "is not finite" in record.reason
    assert tensors == {}


def test_a_replay_reproduces_the_recorded_losses(
    done: Path, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt = RunPaths(root=done).round(1).attempt(1)
    client = cohort(attempt)[1]
    argv = [str(attempt.root), "--client", client, "--scratch", str(tmp_path / "scratch")]
    assert run_program("client", argv, session=session) == 0
    *losses, file, last = capsys.readouterr().out.splitlines()
    recorded = updates(RunPaths(root=done).round(1))[client][0].losses
    assert losses == [f"step {n} loss {loss:.6f}" for n, loss in enumerate(recorded, 1)]
    assert Path(file.removeprefix("update in ")).is_file()
    assert last == "the losses equal the recorded ones"
    with pytest.raises(UserError, match="client nobody is not in this round's cohort"):
        replay(alone(session, attempt), attempt, "nobody", tmp_path / "scratch")


def test_a_replay_says_what_differs(attempt: AttemptPaths, done: Path, tmp_path: Path) -> None:
    shutil.copytree(RunPaths(root=done).round(1).updates, round_of(attempt).updates)
    change_config(attempt, "training", precision="bfloat16")
    found = replay(alone(Session(), attempt), attempt, cohort(attempt)[0], tmp_path / "scratch")
    assert not found.agrees
    assert "precision: float32 then, bfloat16 with sums in float32 now" in found.lines()


def test_a_client_without_rows_is_named(attempt: AttemptPaths) -> None:
    class Empty(Session):
        def data(self, prepared: PreparedRecord) -> TokenizedClients:  # noqa: ARG002
            return SimpleNamespace(rows=lambda _client, _split: [])  # type: ignore[return-value]

    with pytest.raises(UserError, match="has no training rows"):
        work(attempt, None, ME, Empty())
