"""Where a run stands, read from its files alone."""

import os
from pathlib import Path

from fedllm.reporting.logs import client_log, newest_logs, tail
from fedllm.reporting.status import RoundStatus, run_status
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CollectionRecord, LeaseRecord, RoundRecord
from fedllm.storage.tensors import publish_update
from tests.reporting.runs import CLIENTS, attempt, begin, claim, draw, hold, prepare
from tests.storage.samples import record_of
from tests.storage.updates import publish


def current(paths: RunPaths) -> RoundStatus:
    found = run_status(paths).current
    assert found is not None
    return found


def finish(paths: RunPaths, *numbers: int) -> None:
    for number in numbers:
        record = RoundRecord(round=number, lease=1, state_sha256="", clients=4)
        record.publish(paths.round(number).record)


def test_a_run_that_was_only_opened_is_stopped_and_not_prepared(tmp_path: Path) -> None:
    found = run_status(begin(tmp_path, rounds=3))
    assert (found.state, found.coordinator) == ("stopped", "none")
    assert (found.rounds_done, found.rounds, found.prepared) == (0, 3, False)
    assert found.current is None


def test_a_coordinator_is_running_stopped_or_on_another_machine(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    lease = hold(paths)
    assert run_status(paths).state == "running"
    assert str(os.getpid()) in run_status(paths).coordinator
    lease.release()
    assert run_status(paths).state == "stopped"
    gone = lease.record.model_copy(update={"number": 2, "start_time": "1"})
    gone.publish(paths.lease(2))
    assert run_status(paths).state == "stopped"
    LeaseRecord.model_validate({**gone.model_dump(), "number": 3, "host": "elsewhere"}).publish(
        paths.lease(3)
    )
    assert run_status(paths).state == "unknown"
    LeaseRecord.model_validate({**gone.model_dump(), "number": 4, "slurm_job": "77"}).publish(
        paths.lease(4)
    )
    assert run_status(paths).coordinator.startswith("Slurm job 77, host ")
    answers = {None: "unknown", False: "running", True: "stopped"}
    for answer, state in answers.items():
        assert run_status(paths, lambda _holder, said=answer: said).state == state


def test_a_prepared_run_first_makes_the_state_that_training_starts_from(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    assert current(paths) == RoundStatus(round=0, step="state")
    finish(paths, 0)
    assert current(paths) == RoundStatus(round=1, step="cohort")


def test_published_claimed_and_failed_clients_are_counted(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0, 1, 2)
    draw(paths, 3)
    for bundle in (0, 1, 2):
        claim(paths, 3, 1, bundle)
    third = paths.round(3)
    publish(third, CLIENTS[0], bundle=0)
    failed = record_of(CLIENTS[1], status="failed", reason="loss is nan")
    publish_update(third.update(attempt=1, bundle=1, part=0), [failed], {})
    publish(third, CLIENTS[2], bundle=2, run_id="another run")
    third.update(attempt=1, bundle=3, part=0).write_bytes(b"half")
    assert current(paths) == RoundStatus(
        round=3,
        step="train",
        cohort=4,
        published=2,
        claimed=1,
        failed=(f"{CLIENTS[1]}: loss is nan",),
        attempts=1,
    )


def test_what_lost_tasks_had_claimed_is_not_at_work(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    claim(paths, 1, 1, 0)
    claim(paths, 1, 1, 1)
    attempt(paths, 1, 2)
    assert (current(paths).attempts, current(paths).claimed) == (2, 0)
    claim(paths, 1, 2, 1)
    assert current(paths).claimed == 1


def test_a_round_that_trains_while_the_one_before_is_evaluated_is_the_current_one(
    tmp_path: Path,
) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    CollectionRecord(round=1, lease=1, updates=[]).publish(paths.round(1).collection)
    assert current(paths).step == "aggregate"
    paths.round(1).aggregate_record.parent.mkdir(parents=True)
    paths.round(1).aggregate_record.write_text("{}")
    assert current(paths).step == "evaluate"
    draw(paths, 2)
    assert (current(paths).round, current(paths).step) == (2, "train")


def test_a_run_whose_rounds_are_all_recorded_is_done(tmp_path: Path) -> None:
    paths = begin(tmp_path, rounds=2)
    prepare(paths)
    finish(paths, 0, 1, 2)
    found = run_status(paths)
    assert (found.state, found.rounds_done, found.current) == ("done", 2, None)


# --- logs


def log(path: Path, text: str = "line\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_newest_logs_are_those_of_the_last_round_that_has_any(tmp_path: Path) -> None:
    paths = RunPaths(root=tmp_path)
    assert newest_logs(paths) == []
    worker = log(paths.all_logs / "worker-1.log")
    assert newest_logs(paths) == [worker]
    log(paths.logs(1) / "a.log")
    second = [log(paths.logs(2) / "a.log"), log(paths.logs(2) / "b.out")]
    log(paths.logs(2) / "sbatch.sh")
    paths.logs(3).mkdir()
    assert newest_logs(paths) == second


def test_a_clients_log_is_that_of_the_task_that_claimed_it_last(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    assert client_log(paths, 3, CLIENTS[0]) is None
    draw(paths, 1)
    claim(paths, 1, 1, 0, log="/logs/first")
    claim(paths, 1, 1, 1)
    draw(paths, 2)
    assert client_log(paths, 3, CLIENTS[0]) == Path("/logs/first")
    assert client_log(paths, 3, CLIENTS[1]) is None
    claim(paths, 2, 1, 0, log="/logs/second")
    attempt(paths, 2, 2)
    claim(paths, 2, 2, 0, log="/logs/third")
    assert client_log(paths, 3, CLIENTS[0]) == Path("/logs/third")


def test_the_end_of_a_log_is_shown_also_of_a_long_one_or_one_that_is_gone(tmp_path: Path) -> None:
    path = log(tmp_path / "a.log", "".join(f"{n} ü\n" for n in range(30_000)))
    assert tail(path, 2) == "29998 ü\n29999 ü"
    path.write_bytes(b"\xff end")
    assert tail(path, 5) == "\N{REPLACEMENT CHARACTER} end"
    assert tail(tmp_path / "none.log", 5) == "(no longer there)"
