"""Status of a run, read from its files alone."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.reporting.status.attempt_tasks import AttemptStatus, EndingStatus, TaskStatus
from fedllm.reporting.status.logs import client_log, newest_logs, tail
from fedllm.reporting.status.pace import Estimate
from fedllm.reporting.status.queue import (
    ArrayStatus,
    AskScheduler,
    QueueStatus,
    ReasonStatus,
    SchedulerAnswers,
)
from fedllm.reporting.status.status import (
    FailedClient,
    RoundStatus,
    RunStatus,
    StatusReader,
    run_status,
)
from fedllm.reporting.status.status_text import status_text
from fedllm.storage.kept_records import FailureRecord
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import (
    AggregateRecord,
    ArrayRecord,
    CollectedUpdate,
    CollectionRecord,
    CoordinatorJobRecord,
    EndingRecord,
    ErrorRecord,
    JobsRecord,
    LeaseRecord,
    OutcomeRecord,
    RoundRecord,
    TaskRecord,
    TierMix,
    WorkersRecord,
)
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


def answering(states: Mapping[str, str], reasons: Mapping[str, str] | None = None) -> AskScheduler:
    def ask(ids: Sequence[str]) -> SchedulerAnswers:
        return SchedulerAnswers(
            states={id_: states.get(id_, "gone") for id_ in ids}, reasons=dict(reasons or {})
        )

    return ask


def read(
    paths: RunPaths,
    *,
    states: Mapping[str, str],
    reasons: Mapping[str, str] | None = None,
    advice: Mapping[str, str] | None = None,
) -> RunStatus:
    """Read where a run stands while a scheduler answers."""
    helps = dict(advice or {})
    return StatusReader(
        paths, ask=answering(states, reasons), advice=lambda reason: helps.get(reason, "")
    ).read()


def note(paths: RunPaths, number: int, task: str, **changes: object) -> None:
    """Make the progress record of a task."""
    record = TaskRecord.model_validate({"task": task, "node": "n", "clients_done": 0, **changes})
    record.publish(paths.round(number).attempt(1).task(task))


def jobs(paths: RunPaths, number: int, ids: list[str]) -> None:
    JobsRecord(ids={"t-small-0": ids}).publish(paths.round(number).attempt(1).jobs)


def timed(paths: RunPaths, number: int, *, begin: float, seconds: float) -> None:
    """Make a round that is done, drawn at `begin`; half of its time was training."""
    here = paths.round(number)
    draw(paths, number)
    updates = [
        CollectedUpdate(client=id_, tier="small", attempt=1, file="", sha256="", weight=1.0)
        for id_ in CLIENTS
    ]
    mix = {"small": TierMix(drawn=4, used=4, tokens=5.0 * seconds, seconds=1.0)}
    CollectionRecord(round=number, lease=1, updates=updates, tiers=mix).publish(here.collection)
    AggregateRecord(
        round=number, method="", rank={}, sha256="", seconds=0.0, clients=4, device="cpu"
    ).publish(here.aggregate_record)
    finish(paths, number)
    ends = {here.cohort: begin, here.collection: begin + seconds / 2}
    for path, at in (ends | {here.aggregate_record: begin + seconds}).items():
        os.utime(path, (at, at))


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
    found = run_status(paths)
    assert found.state == "stopped"
    assert found.coordinator.startswith("none; the last one (")
    LeaseRecord.model_validate({**gone.model_dump(), "number": 3, "host": "elsewhere"}).publish(
        paths.lease(3)
    )
    assert run_status(paths).state == "unknown"
    LeaseRecord.model_validate({**gone.model_dump(), "number": 4, "slurm_job": "77"}).publish(
        paths.lease(4)
    )
    assert run_status(paths).coordinator.startswith("none; the last one (Slurm job 77, host ")
    answers: dict[bool | None, str] = {None: "unknown", False: "running", True: "stopped"}

    def holder_is_gone(answer: bool | None, _holder: LeaseRecord) -> bool | None:
        return answer

    for answer, state in answers.items():
        assert run_status(paths, partial(holder_is_gone, answer)).state == state


def test_a_prepared_run_first_makes_the_state_that_training_starts_from(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    assert current(paths) == RoundStatus(round=0, step="state")
    finish(paths, 0)
    assert current(paths) == RoundStatus(round=1, step="cohort")


def test_published_claimed_waiting_and_failed_clients_are_counted(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0, 1, 2)
    draw(paths, 3)
    for bundle in (0, 1, 2):
        claim(paths, 3, 1, bundle)
    third = paths.round(3)
    publish(third, CLIENTS[0], bundle=0)
    failed = record_of(CLIENTS[1], status="failed", reason="loss is nan", node="n7", log="/l")
    publish_update(third.update(attempt=1, bundle=1, part=0), [failed], {})
    publish(third, CLIENTS[2], bundle=2, run_id="another run")
    third.update(attempt=1, bundle=3, part=0).write_bytes(b"half")
    found = current(paths)
    assert (found.round, found.step, found.cohort) == (3, "train", 4)
    assert (found.published, found.claimed, found.waiting) == (2, 1, 1)
    assert found.failed == (
        FailedClient(client=CLIENTS[1], reason="loss is nan", node="n7", log="/l"),
    )


def test_a_file_that_was_read_is_not_read_again_and_a_new_one_is(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    publish(paths.round(1), CLIENTS[0], bundle=0, run_id="run", round=1)
    reader = StatusReader(paths)
    before = reader.read().current
    assert before and before.published == 1
    # the file is empty now, but it was read before
    paths.round(1).update(attempt=1, bundle=0, part=0).write_bytes(b"")
    publish(paths.round(1), CLIENTS[1], bundle=1, run_id="run", round=1)
    after = reader.read().current
    assert after and after.published == 2


def test_tasks_at_work_are_shown_with_their_node_log_client_and_step(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    for bundle, task in enumerate(("7_10", "7_9", "7_9", "7_1")):
        claim(paths, 1, 1, bundle, task=task, log=f"/logs/{task}")
    publish(paths.round(1), CLIENTS[3], bundle=3, run_id="run", round=1)
    note(paths, 1, "7_9", client=CLIENTS[1], step=5, allocated_seconds=90.0, clients_done=4)
    note(paths, 1, "7_1", state="ended")
    note(paths, 1, "7_2", state="starting", node="n2")
    tasks = {task.task: task for task in current(paths).tasks}
    assert list(tasks) == ["7_2", "7_9", "7_10"]
    assert tasks["7_9"] == TaskStatus(
        task="7_9",
        state="training",
        node="n",
        log="/logs/7_9",
        client=CLIENTS[1],
        clients=(),
        step=5,
        clients_done=4,
        held=2,
        seconds=90.0,
    )
    assert (tasks["7_10"].state, tasks["7_10"].log) == ("starting", "/logs/7_10")
    assert (tasks["7_2"].state, tasks["7_2"].node, tasks["7_2"].held) == ("starting", "n2", 0)


def test_a_task_that_trains_a_group_names_the_first_client_and_counts_the_others(
    tmp_path: Path,
) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    note(paths, 1, "7_1", client=CLIENTS[1], clients=CLIENTS[1:], step=5)
    note(paths, 1, "7_2", client=CLIENTS[0], clients=CLIENTS[:1], step=6)
    assert current(paths).tasks[0].clients == CLIENTS[1:]
    lines = status_text(tmp_path, run_status(paths)).splitlines()
    one, other = (line for line in lines if line.strip().startswith("7_"))
    assert f"{CLIENTS[1]} and {len(CLIENTS) - 2} more  " in one
    assert CLIENTS[0] in other and " and " not in other


def test_a_task_that_slurm_no_longer_knows_holds_nothing(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    for bundle, task in enumerate(("7_0", "7_1")):
        claim(paths, 1, 1, bundle, task=task)
    jobs(paths, 1, ["7_0", "7_1"])
    found = read(paths, states={"7_0": "gone", "7_1": "running"}).current
    assert found
    assert [(task.task, task.state) for task in found.tasks] == [
        ("7_0", "gone"),
        ("7_1", "starting"),
    ]
    assert (found.claimed, found.waiting) == (1, 3)


def test_claims_of_lost_tasks_are_not_at_work(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    claim(paths, 1, 1, 0)
    claim(paths, 1, 1, 1)
    attempt(paths, 1, 2)
    assert (len(current(paths).attempts), current(paths).claimed) == (2, 0)
    claim(paths, 1, 2, 1)
    assert current(paths).claimed == 1


def test_an_attempt_shows_its_waves_and_why_tasks_ended(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    attempt(
        paths,
        1,
        1,
        arrays=[ArrayRecord(name="t-small-0", worker_class="small", tasks=3)],
        workers={"small": WorkersRecord(tasks=7, parallel=3)},
        adopted=["5_0"],
        excluded_nodes=["n1"],
    )
    jobs(paths, 1, ["7_0", "7_1", "7_2"])
    claim(paths, 1, 1, 0)
    first = paths.round(1).attempt(1)
    OutcomeRecord(
        endings={
            "7_0": EndingRecord(state="NODE_FAIL", node="n3"),
            "7_1": EndingRecord(state="NODE_FAIL", node="n1", log="/logs/7_1"),
            "7_2": EndingRecord(state="CANCELLED"),
        },
        cancelled={"7_2": "no progress for 60 minutes"},
    ).publish(first.outcome)
    told = ErrorRecord(kind="x", message="no such model", exit_code=2, log="/logs/7_0")
    for task in ("7_0", "7_1"):
        told.publish(first.task_error(task))
    assert current(paths).attempts == (
        AttemptStatus(
            attempt=1,
            tasks_wanted=7,
            tasks_submitted=3,
            tasks_adopted=1,
            bundles=4,
            bundles_claimed=1,
            endings=(
                EndingStatus(state="CANCELLED", tasks=1, nodes=(), log=""),
                EndingStatus(state="NODE_FAIL", tasks=2, nodes=("n1", "n3"), log="/logs/7_1"),
            ),
            cancelled={"no progress for 60 minutes": 1},
            excluded_nodes=("n1",),
            errors=("no such model (log /logs/7_0)",),
        ),
    )
    text = status_text(tmp_path, run_status(paths))
    assert "attempt 1: 3 of 7 tasks submitted, 1 reused from the previous round, 1 of 4" in text
    assert "2 ended NODE_FAIL on n1, n3 (log /logs/7_1)" in text
    assert "1 ended by fedllm: no progress for 60 minutes" in text
    assert "nodes left out: n1" in text


def test_suspended_tasks_are_neither_running_nor_gone(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    jobs(paths, 1, ["7_0"])
    claim(paths, 1, 1, 0, task="7_0")
    note(paths, 1, "7_0", state="training", client=CLIENTS[0])
    found = read(paths, states={"7_0": "suspended"})
    assert found.queue
    assert [(array.running, array.suspended) for array in found.queue.arrays] == [(0, 1)]
    assert found.current
    assert [task.state for task in found.current.tasks] == ["suspended"]
    assert "1 suspended: an admin, or a job that preempts them" in status_text(tmp_path, found)


def test_reasons_to_wait_are_counted_and_come_with_advice(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    ids = [f"7_{n}" for n in range(5)]
    jobs(paths, 1, ids)
    states = dict.fromkeys(ids, "waiting") | {"7_0": "running"}
    reasons = dict.fromkeys(ids[1:], "Priority") | {"7_4": "JobHeldUser"}
    found = read(paths, states=states, reasons=reasons, advice={"JobHeldUser": "release it"})
    assert found.queue == QueueStatus(
        problem="",
        arrays=(
            ArrayStatus(
                name="t-small-0",
                tasks=5,
                waiting=4,
                running=1,
                reasons=(
                    ReasonStatus(reason="Priority", tasks=3, advice=""),
                    ReasonStatus(reason="JobHeldUser", tasks=1, advice="release it"),
                ),
            ),
        ),
    )
    lines = status_text(tmp_path, found).splitlines()
    assert "t-small-0: 1 running, 4 waiting" in lines
    assert "  3 wait for Priority" in lines
    assert "  1 wait for JobHeldUser: release it" in lines


def test_without_an_answer_of_the_scheduler_the_files_are_shown(
    tmp_path: Path,
) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    jobs(paths, 1, ["7_0"])
    publish(paths.round(1), CLIENTS[0], bundle=0, run_id="run", round=1)
    held = hold(paths)
    elsewhere = held.record.model_copy(update={"number": 2, "slurm_job": "77"})
    elsewhere.publish(paths.lease(2))
    asked = list[object]()
    reader = StatusReader(
        paths, gone=asked.append, ask=lambda _ids: SchedulerAnswers(problem="Slurm does not answer")
    )
    found = reader.read()
    assert (found.state, found.queue) == (
        "unknown",
        QueueStatus(problem="Slurm does not answer", arrays=()),
    )
    assert not asked
    text = status_text(tmp_path, found)
    assert text.count("does not answer") == 1
    assert "1 of 4 clients published" in text


def test_the_coordinators_job_is_shown_while_it_waits_and_behind_one_that_runs(
    tmp_path: Path,
) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    CoordinatorJobRecord(job="80", mode="chained").publish(paths.coordinator_job)
    found = read(paths, states={"80": "waiting"}, reasons={"80": "Priority"})
    assert (found.state, found.coordinator) == ("waiting", "Slurm job 80 waiting (Priority)")
    link = hold(paths).record.model_copy(update={"number": 2, "slurm_job": "79"})
    link.publish(paths.lease(2))
    found = read(paths, states={"79": "running", "80": "waiting"}, reasons={"80": "Dependency"})
    assert found.state == "running"
    assert found.coordinator.startswith("Slurm job 79, host ")
    assert found.coordinator.endswith("; next in its chain: Slurm job 80 waiting (Dependency)")
    gone = StatusReader(paths, gone=lambda _holder: True, ask=answering({"80": "gone"}))
    assert gone.read().state == "stopped"


def test_the_end_is_estimated_from_finished_rounds(tmp_path: Path) -> None:
    paths = begin(tmp_path, rounds=6)
    prepare(paths)
    finish(paths, 0)
    for number, seconds in ((1, 100), (2, 300), (3, 200)):
        timed(paths, number, begin=10_000 * number, seconds=seconds)
    draw(paths, 4)
    os.utime(paths.round(4).cohort, (50_000, 50_000))
    publish(paths.round(4), CLIENTS[0], bundle=0, run_id="run", round=4)
    found = StatusReader(paths, now=lambda: 50_050.0).read()
    assert [(pace.round, pace.seconds) for pace in found.recent] == [(1, 100), (2, 300), (3, 200)]
    assert found.recent[2].clients_per_minute == pytest.approx(60 * 4 / 100)
    assert found.recent[2].tokens_per_second == 10.0
    assert found.recent[2].tiers["small"].used == 4
    assert found.current and found.current.pace
    assert found.current.pace.clients_per_minute == pytest.approx(60 / 50)
    # 150 s of round 4 are left, and two more rounds of the median
    assert found.estimate == Estimate(
        seconds=150.0 + 2 * 200.0, how="3 rounds at 200 s, the median so far"
    )
    assert "round 3 took 3 min" in status_text(tmp_path, found)


def test_the_end_of_the_first_round_is_estimated_from_its_published_clients(tmp_path: Path) -> None:
    paths = begin(tmp_path, rounds=2)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1)
    os.utime(paths.round(1).cohort, (1000, 1000))
    assert StatusReader(paths, now=lambda: 1030.0).read().estimate is None
    publish(paths.round(1), CLIENTS[0], bundle=0, run_id="run", round=1)
    found = StatusReader(paths, now=lambda: 1030.0).read()
    assert found.estimate
    assert found.estimate.seconds == 90.0 + 120.0
    assert "1 of 4 clients in 30 s" in found.estimate.how


def test_hours_used_are_those_of_rounds_that_are_done_and_of_tasks_at_work(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    RoundRecord(
        round=1,
        lease=1,
        state_sha256="",
        clients=4,
        tasks=2,
        busy_seconds=1800,
        allocated_seconds=3600,
        gpu_seconds=7200,
    ).publish(paths.round(1).record)
    draw(paths, 2)
    options: dict[str, Any] = {"gpus_per_node": "a100:4"}
    attempt(
        paths,
        2,
        1,
        arrays=[ArrayRecord(name="a", worker_class="small", tasks=2, options=options)],
    )
    note(
        paths,
        2,
        "7_0",
        worker_class="small",
        busy_seconds=1000.0,
        allocated_seconds=1800.0,
        earlier_busy_seconds=800.0,
        earlier_allocated_seconds=1800.0,
    )
    found = run_status(paths)
    assert found.task_hours == 2.0
    assert found.gpu_hours == 2.0 + 4.0
    assert found.array_efficiency == 0.5


def test_status_of_many_clients_is_read_within_a_second(tmp_path: Path) -> None:
    ids = tuple(f"client {n} ü" for n in range(1613))
    paths = begin(tmp_path)
    prepare(paths)
    finish(paths, 0)
    draw(paths, 1, ids)
    modules = {f"model.layers.{n}.self_attn.q_proj": (1.0, 2.0) for n in range(168)}
    zeros = {module: (torch.zeros(1, 1), torch.zeros(1, 1)) for module in modules}
    for bundle in range(40):
        sent = [
            record_of(id_, run_id="run", round=1, norms=modules, scales=dict.fromkeys(modules, 1.0))
            for id_ in ids[40 * bundle : 40 * (bundle + 1)]
        ]
        place = paths.round(1).update(attempt=1, bundle=bundle, part=0)
        publish_update(place, sent, {sent[0].client: zeros})
    for bundle in range(200):
        claim(paths, 1, 1, bundle, task=f"7_{bundle // 4}")
    reader = StatusReader(paths)
    seconds = []
    for _ in range(2):
        begun = time.process_time()
        found = reader.read().current
        seconds.append(time.process_time() - begun)
        assert found and found.published == 1600
    assert seconds[0] < 1.0
    assert seconds[1] < 0.1


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
    claim(paths, 1, 1, 0, log=str(paths.all_logs / "first"))
    claim(paths, 1, 1, 1)
    draw(paths, 2)
    assert client_log(paths, 3, CLIENTS[0]) == paths.all_logs / "first"
    assert client_log(paths, 3, CLIENTS[1]) is None
    claim(paths, 2, 1, 0, log=str(paths.all_logs / "second"))
    attempt(paths, 2, 2)
    claim(paths, 2, 2, 0, log=str(paths.all_logs / "third"))
    assert client_log(paths, 3, CLIENTS[0]) == paths.all_logs / "third"


def test_the_end_of_a_log_is_shown_also_of_a_long_one_or_one_that_is_gone(tmp_path: Path) -> None:
    path = log(tmp_path / "a.log", "".join(f"{n} ü\n" for n in range(30_000)))
    assert tail(path, 2) == "29998 ü\n29999 ü"
    path.write_bytes(b"\xff end")
    assert tail(path, 5) == "\N{REPLACEMENT CHARACTER} end"
    assert tail(tmp_path / "none.log", 5) == "(no longer there)"


def test_a_failed_run_names_step_message_log_and_remedy(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    lease = hold(paths)
    attempt_of_prepare = paths.prepare_job(1)
    publish_bytes(attempt_of_prepare.submission, b"")
    ErrorRecord(kind="DataError", message="no rows", exit_code=2, log="/l/1.out").publish(
        attempt_of_prepare.error
    )
    lease.release()
    found = run_status(paths)
    assert found.state == "failed"
    assert found.failure is not None
    assert (found.failure.step, found.failure.log) == ("prepare", "/l/1.out")
    text = status_text(tmp_path, found)
    assert "failed in prepare: no rows; log /l/1.out" in text
    assert f"remedy: change what the message names, then: fedllm resume {tmp_path}" in text


def test_the_failure_of_an_earlier_coordinator_is_over(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    first = hold(paths)
    failure = FailureRecord(
        lease=1, round=1, step="train", kind="RunFailed", message="quorum", exit_code=1
    )
    failure.publish(paths.failure(1))
    first.release()
    assert run_status(paths).state == "failed"
    assert "failed in train of round 1: quorum" in status_text(tmp_path, run_status(paths))
    second = hold(paths)
    assert run_status(paths).state == "running"
    second.release()
    assert run_status(paths).state == "stopped"


def test_a_full_disk_is_named_but_the_run_only_stopped(tmp_path: Path) -> None:
    paths = begin(tmp_path)
    prepare(paths)
    lease = hold(paths)
    FailureRecord(
        lease=1, round=1, step="train", kind="StorageFull", message="no space", exit_code=3
    ).publish(paths.failure(1))
    lease.release()
    found = run_status(paths)
    assert found.state == "stopped"
    assert f"nothing is lost; go on with: fedllm resume {tmp_path}" in status_text(tmp_path, found)
