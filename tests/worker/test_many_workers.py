"""Workers beside their training: they save, are requeued, end early, or wait idle."""

import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedllm.cli.execution import start
from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.programs.entry_points import run as run_program
from fedllm.storage.paths import AttemptPaths, RoundPaths, RunPaths
from fedllm.storage.records import ClaimRecord, SubmissionRecord, TaskRecord
from fedllm.worker.idle import newest_attempt
from fedllm.worker.worker import STOPPED, work
from tests.storage.interference import just_before
from tests.tiny import Tiny
from tests.worker.attempts import (
    ME,
    OTHER,
    assert_same_bits,
    change_config,
    cohort,
    files,
    plan,
    round_of,
    untrained,
    updates,
)


@contextmanager
def when_saved(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` once, when a client's checkpoint is about to be renamed into place."""
    with ExitStack() as stack:

        def renamed(_source: object, target: object, *_: object) -> None:
            if "/checkpoints/" in str(target):
                action()
            else:
                stack.enter_context(just_before("os.rename", renamed))

        stack.enter_context(just_before("os.rename", renamed))
        yield


def interrupt(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def saving(attempt: AttemptPaths) -> AttemptPaths:
    """An attempt with one bundle of all clients, which are saved before every step."""
    change_config(attempt, "training", checkpoint_every_minutes=1e-9)
    plan(attempt, [cohort(attempt)])
    return attempt


def checkpoints(attempt: AttemptPaths) -> list[Path]:
    return list(round_of(attempt).checkpoints.rglob("*.safetensors"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_client_in_training_is_saved_and_another_task_goes_on_with_it(
    saving: AttemptPaths, done: Path, session: Session, number: int
) -> None:
    with when_saved(interrupt(number)):
        assert work(saving, None, ME, session) == STOPPED
    first, *_ = clients = cohort(saving)
    assert len(checkpoints(saving)) == 1
    assert not files(saving)
    later = round_of(saving).attempt(2)
    SubmissionRecord.read(saving.submission).publish(later.submission)
    assert work(later, None, OTHER, session) == 0
    assert_same_bits(round_of(saving), done)
    found = updates(round_of(saving))
    assert {client: bool(found[client][0].resumed_at) for client in clients} == {
        client: client == first for client in clients
    }
    # published clients need no checkpoint
    assert not checkpoints(saving)


def test_periodic_checkpoints_outlive_a_kill(
    saving: AttemptPaths, done: Path, session: Session
) -> None:
    class Killed(BaseException):
        pass

    def killed() -> None:
        raise Killed

    with ExitStack() as stack, pytest.raises(Killed):
        # at the second save
        stack.enter_context(when_saved(lambda: stack.enter_context(when_saved(killed))))
        work(saving, None, ME, session)
    assert len(checkpoints(saving)) == 1
    assert work(saving, None, ME, session) == 0
    assert_same_bits(round_of(saving), done)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this process an array task; its calls of scontrol go to the returned file."""
    calls = tmp_path / "calls"
    calls.touch()
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    array, number = ME.task.split("_")
    for name, value in (
        ("SLURM_ARRAY_JOB_ID", array),
        ("SLURM_ARRAY_TASK_ID", number),
        ("FEDLLM_TASK", ME.task),
    ):
        monkeypatch.setenv(name, value)
    return calls


def test_a_warned_task_is_requeued(
    saving: AttemptPaths, session: Session, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with when_saved(interrupt(signal.SIGUSR2)):
        assert work(saving, None, ME, session) == STOPPED
    assert slurm.read_text() == f"requeue {ME.task}\n"
    assert f"{ME.task}: requeued" in capfd.readouterr().err


def test_a_refused_requeue_is_logged(
    saving: AttemptPaths, session: Session, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (slurm.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho disabled >&2; exit 1\n")
    with when_saved(interrupt(signal.SIGUSR2)):
        assert work(saving, None, ME, session) == STOPPED
    assert f"{ME.task}: not requeued (disabled); the next attempt" in capfd.readouterr().err


def test_a_terminated_task_is_not_requeued(
    saving: AttemptPaths, session: Session, slurm: Path
) -> None:
    with when_saved(interrupt(signal.SIGTERM)):
        assert work(saving, None, ME, session) == STOPPED
    assert not slurm.read_text()


def test_a_start_without_a_step_is_not_requeued(
    saving: AttemptPaths, session: Session, slurm: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert work(saving, None, ME, session, signals=signals) == STOPPED
    assert not slurm.read_text()
    assert "not requeued (no step was taken since it started)" in capfd.readouterr().err


def test_a_worker_of_a_finished_round_writes_nothing(done: Path, session: Session) -> None:
    attempt = RunPaths(root=done).round(1).attempt(1)
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert work(attempt, None, OTHER, session) == 0
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*")}


def test_a_worker_of_an_earlier_attempt_claims_nothing(
    attempt: AttemptPaths, session: Session
) -> None:
    later = round_of(attempt).attempt(2)
    SubmissionRecord.read(attempt.submission).publish(later.submission)
    assert work(attempt, None, ME, session) == 0
    assert not attempt.claim_files()


def test_a_group_may_write_what_its_workers_write(attempt: AttemptPaths, session: Session) -> None:
    change_config(attempt, "storage", group="a-group")
    plan(attempt, [cohort(attempt)[:1]])
    before = os.umask(0o022)
    try:
        assert run_program("client", [str(attempt.root)], session=session) == 0
    finally:
        os.umask(before)
    written = [*attempt.claims.rglob("*"), attempt.claims, *round_of(attempt).updates.iterdir()]
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == (0o770 if path.is_dir() else 0o660)


@pytest.fixture(scope="module")
def two_rounds(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = ["rounds=2", "evaluation.every=0", "scheduler.clients_per_bundle=4"]
    return start(tiny.config, overrides, tmp_path_factory.mktemp("two") / "run")


@pytest.fixture
def second(two_rounds: Path, tmp_path: Path) -> RoundPaths:
    """A second round that is planned and adopts the worker `ME`."""
    run = RunPaths(root=tmp_path / "two")
    shutil.copytree(two_rounds, run.root)
    paths = run.round(2)
    attempt = untrained(paths)
    adopt(attempt, ME.task)
    change_config(attempt, "scheduler", kind="slurm", linger_minutes=10)
    return paths


def adopt(attempt: AttemptPaths, *tasks: str) -> None:
    plan = SubmissionRecord.read(attempt.submission)
    plan.model_copy(update={"adopted": list(tasks)}).publish(attempt.submission)


def before(paths: RoundPaths) -> AttemptPaths:
    """The finished attempt of the round before, with which the worker starts."""
    return paths.previous.attempt(1)


@contextmanager
def meanwhile(action: Callable[[], object], when: Callable[[], object]) -> Iterator[None]:
    def wait() -> None:
        deadline = time.monotonic() + 60
        while not when() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def test_an_idle_worker_works_on_the_round_that_adopts_it_until_the_run_is_done(
    second: RoundPaths, two_rounds: Path, session: Session
) -> None:
    attempt, plan_ = second.attempt(1), SubmissionRecord.read(second.attempt(1).submission)
    attempt.submission.unlink()
    found: list[TaskRecord] = []

    def is_idle() -> bool:
        record = TaskRecord.find(attempt.task(ME.task))
        return record is not None and record.state == "lingering"

    def done() -> None:
        found.append(TaskRecord.read(attempt.task(ME.task)))
        shutil.copy(RunPaths(root=two_rounds).round(2).record, second.record)

    with (
        meanwhile(lambda: plan_.publish(attempt.submission), lambda: True),
        meanwhile(done, is_idle),
    ):
        assert work(before(second), None, ME, session) == 0
    (record,) = found
    assert (record.state, record.clients_done, record.starts) == ("lingering", 4, 1)
    assert record.startup_seconds < record.allocated_seconds
    assert TaskRecord.read(attempt.task(ME.task)).state == "ended"
    assert_same(second, RunPaths(root=two_rounds).round(2))
    assert not before(second).task(ME.task).exists()


def assert_same(found: RoundPaths, expected: RoundPaths) -> None:
    losses = {client: record.losses for client, (record, _) in updates(expected).items()}
    assert {client: record.losses for client, (record, _) in updates(found).items()} == losses


def test_a_requeued_worker_that_was_idle_goes_on_with_its_bundles(
    second: RoundPaths, two_rounds: Path, session: Session
) -> None:
    attempt = second.attempt(1)
    change_config(attempt, "training", checkpoint_every_minutes=1e-9)
    with when_saved(interrupt(signal.SIGUSR2)):
        assert work(before(second), None, ME, session) == STOPPED
    change_config(attempt, "scheduler", linger_minutes=0.001)
    # Slurm starts it with the arguments of its first start
    assert work(before(second), None, ME, session) == 0
    assert_same(second, RunPaths(root=two_rounds).round(2))
    assert TaskRecord.read(attempt.task(ME.task)).starts == 2


def test_a_worker_that_no_round_adopts_waits_its_minutes_and_ends(
    second: RoundPaths, session: Session
) -> None:
    adopt(second.attempt(1), OTHER.task)
    change_config(second.attempt(1), "scheduler", linger_minutes=0.005)
    began = time.monotonic()
    assert work(before(second), None, ME, session) == 0
    assert time.monotonic() - began >= 0.3
    assert not second.attempt(1).claim_files()


def test_a_signal_ends_an_idle_worker(second: RoundPaths, session: Session) -> None:
    adopt(second.attempt(1))
    with StopSignals() as signals, meanwhile(interrupt(signal.SIGUSR2), lambda: True):
        assert work(before(second), None, ME, session, signals=signals) == 0
    assert signals.came


def test_a_worker_whose_time_is_nearly_over_does_not_wait_idle(
    second: RoundPaths, session: Session
) -> None:
    first = before(second)
    adopt(second.attempt(1))
    record = SubmissionRecord.read(first.submission)
    arrays = [array.model_copy(update={"minutes": 60}) for array in record.arrays]
    record.model_copy(update={"arrays": arrays}).publish(first.submission)
    worker_class = record.arrays[0].worker_class
    began = time.monotonic() - 3600
    assert work(first, worker_class, ME, session, began=began) == 0


def test_a_single_bundle_worker_does_not_wait_idle(second: RoundPaths, session: Session) -> None:
    first = before(second)
    record = SubmissionRecord.read(first.submission)
    record.model_copy(update={"one_bundle": True}).publish(first.submission)
    assert work(first, None, ME, session) == 0
    assert not second.attempt(1).claim_files()


def test_local_workers_do_not_wait_for_the_next_round(second: RoundPaths, session: Session) -> None:
    change_config(second.attempt(1), "scheduler", kind="local")
    assert work(before(second), None, ME, session) == 0
    assert not second.attempt(1).claim_files()


def test_the_newest_attempt_is_the_last_one_with_a_plan(tmp_path: Path) -> None:
    run = RunPaths(root=tmp_path)

    def planned(round_number: int, attempt: int) -> AttemptPaths:
        paths = run.round(round_number).attempt(attempt)
        paths.submission.parent.mkdir(parents=True)
        paths.submission.touch()
        return paths

    first, second = planned(1, 1), planned(1, 2)
    assert newest_attempt(run, second) is None
    assert newest_attempt(run, first) == second
    # refused, and not yet planned
    (second.root.parent / "03.refused-1").mkdir()
    run.round(2).attempt(1).root.mkdir(parents=True)
    assert newest_attempt(run, first) == second
    assert newest_attempt(run, second) is None
    third = planned(3, 1)
    assert newest_attempt(run, second) == third
    assert newest_attempt(run, third) is None


def test_with_little_time_left_a_worker_takes_the_shorter_bundle(
    attempt: AttemptPaths, session: Session
) -> None:
    # bundle n is estimated at n seconds
    plan(attempt, [[client] for client in cohort(attempt)])
    record = SubmissionRecord.read(attempt.submission)
    arrays = [record.arrays[0].model_copy(update={"worker_class": "small", "minutes": 1.0})]
    record.model_copy(update={"arrays": arrays}).publish(attempt.submission)
    # of its 51 s less than 2 are left; the first bundle is taken in any case
    assert work(attempt, "small", ME, session, began=time.monotonic() - 49.5) == 0
    claimed = [ClaimRecord.read(path).bundle for path in attempt.claim_files()]
    assert 3 in claimed
    assert 2 not in claimed
    assert 0 in claimed
