"""Worker failures: silent workers, broken nodes, memory, preemption."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import ProcessLost, RunFailed, UserError
from fedllm.rounds.advance import advance
from fedllm.rounds.dispatch.cancelling import cancel_jobs
from fedllm.rounds.opening import close_run
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import Ending, SchedulerUnreachable, TaskState
from fedllm.storage.checkpoint_header import CheckpointIdentity, CheckpointRecord
from fedllm.storage.paths import AttemptPaths, RoundPaths
from fedllm.storage.records import (
    ClaimRecord,
    CollectionRecord,
    ErrorRecord,
    OutcomeRecord,
    SubmissionRecord,
)
from fedllm.storage.tensors import Checkpoint, publish_checkpoint
from tests.rounds.cluster import HandMoved, hand_moved, paths_of
from tests.rounds.simulation import Simulation

NOW = 1e-6


@pytest.fixture
def cluster() -> HandMoved:
    return HandMoved(Simulation())


def lose(run: Run, cluster: HandMoved, state: str, node: str = "n1") -> None:
    """End all workers of an attempt before they did anything, and advance once."""
    cluster.end(state, *cluster.alive, node=node)
    assert not advance(run)


def test_a_lost_process_of_a_task_is_named_with_its_log_and_the_task_is_retried(
    tmp_path: Path, cluster: HandMoved
) -> None:
    say: list[str] = []
    run = hand_moved(tmp_path, cluster, say)
    assert not advance(run)
    task = next(iter(cluster.alive))
    error = ProcessLost(f"{task}: process 1 of 4 ended first", log="/logs/7_0_1_log.out")
    path = paths_of(tmp_path).round(1).attempt(1).task_error(task)
    ErrorRecord.of(error, log=error.log).publish(path)
    lose(run, cluster, "FAILED")
    message = f"{task}: process 1 of 4 ended first; log /logs/7_0_1_log.out"
    assert f"round 1, attempt 1: {message}" in say
    assert paths_of(tmp_path).round(1).attempt(2).submission.exists()


def test_a_silent_worker_is_cancelled_and_its_clients_train_elsewhere(
    tmp_path: Path, cluster: HandMoved
) -> None:
    say: list[str] = []
    run = hand_moved(tmp_path, cluster, say, scheduler__hung_minutes=NOW)
    assert not advance(run)
    silent, *others = cluster.alive
    cluster.start(silent)
    cluster.note(silent, "training", clients=["a", "b", "c"])
    assert not advance(run)
    assert not advance(run)
    assert cluster.cancelled == [silent]
    (line,) = (line for line in say if line.startswith(f"{silent}: no progress for"))
    assert "(client a and 2 more, step 3); cancelled" in line
    cluster.end("COMPLETED", *others)
    assert not advance(run)
    outcome = OutcomeRecord.read(paths_of(tmp_path).round(1).attempt(1).outcome)
    assert outcome.cancelled.keys() == {silent}
    cluster.work(*cluster.alive)
    assert advance(run)


def test_a_silent_worker_whose_cancellation_failed_is_cancelled_later(
    tmp_path: Path, cluster: HandMoved, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__hung_minutes=NOW)
    assert not advance(run)
    silent = next(iter(cluster.alive))
    cluster.start(silent)
    cluster.note(silent, "training")
    assert not advance(run)

    def unreachable(ids: Sequence[str], **_only: bool) -> None:
        raise SchedulerUnreachable(f"scancel {ids}: no answer")

    with monkeypatch.context() as away:
        away.setattr(cluster, "cancel", unreachable)
        with pytest.raises(SchedulerUnreachable):
            advance(run)
    assert not advance(run)
    assert cluster.cancelled == [silent]


def test_the_silence_of_a_suspended_worker_begins_when_it_goes_on(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__hung_minutes=NOW)
    assert not advance(run)
    task = next(iter(cluster.alive))
    cluster.start(task)
    cluster.note(task, "training")
    assert not advance(run)
    cluster.start(task, state=TaskState.SUSPENDED)
    for _ in range(3):
        assert not advance(run)
    cluster.start(task)
    # the first look after it went on
    assert not advance(run)
    assert cluster.cancelled == []
    assert not advance(run)
    assert cluster.cancelled == [task]


def test_a_task_that_another_user_owns_is_named_and_the_run_goes_on(
    tmp_path: Path, cluster: HandMoved
) -> None:
    say: list[str] = []
    run = hand_moved(tmp_path, cluster, say, scheduler__hung_minutes=NOW)
    assert not advance(run)
    silent, *others = cluster.alive
    cluster.foreign = {silent}
    cluster.start(silent)
    for _ in range(4):
        assert not advance(run)
    assert [line for line in say if "permission denied" in line] == [
        f"scancel: {silent}: permission denied; the run goes on"
    ]
    cluster.work(silent, *others)
    assert advance(run)


def test_a_silent_worker_that_was_taken_over_is_cancelled_too(
    tmp_path: Path, cluster: HandMoved
) -> None:
    changes: dict[str, Any] = {"scheduler__hung_minutes": NOW, "scheduler__linger_minutes": 5}
    run = hand_moved(tmp_path, cluster, rounds=2, **changes)
    assert not advance(run)
    staying, *others = cluster.alive
    cluster.start(staying)
    cluster.note(staying, "lingering")
    cluster.work(*others)
    assert not advance(run)
    plan = SubmissionRecord.read(paths_of(tmp_path).round(2).attempt(1).submission)
    assert plan.adopted == [staying]
    for _ in range(2):
        assert not advance(run)
    assert cluster.cancelled == [staying]


def test_a_worker_with_progress_a_queued_one_and_an_idle_one_are_left_alone(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__hung_minutes=NOW, scheduler__linger_minutes=5)
    assert not advance(run)
    _waiting, lingering, *_ = cluster.alive
    cluster.start(lingering)
    cluster.note(lingering, "lingering")
    for _ in range(3):
        assert not advance(run)
    assert cluster.cancelled == []
    # with the usual minutes no worker is silent yet
    run = hand_moved(tmp_path / "other", HandMoved(Simulation()))
    assert not advance(run)


def test_a_node_on_which_several_tasks_fail_is_excluded_and_logged(
    tmp_path: Path, cluster: HandMoved
) -> None:
    say: list[str] = []
    changes: dict[str, Any] = {"scheduler__sbatch": {"client": {"exclude": "n7"}}}
    run = hand_moved(tmp_path, cluster, say, rounds=2, **changes)
    assert not advance(run)
    elsewhere = next(iter(cluster.alive))
    cluster.note(elsewhere, "ended")
    cluster.end("COMPLETED", elsewhere)
    lose(run, cluster, "FAILED", node="n3")
    assert cluster.arrays[1].options["exclude"] == "n7,n3"
    assert "node n3: 3 tasks failed there; excluded from now on" in say
    cluster.work(*cluster.alive)
    # the next round begins without it
    assert not advance(run)
    assert cluster.arrays[2].options["exclude"] == "n7,n3"


def test_no_node_is_excluded_if_all_fail(tmp_path: Path, cluster: HandMoved) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__node_failures=2)
    assert not advance(run)
    one, two, three, four = cluster.alive
    cluster.end("FAILED", one, two, node="n1")
    cluster.end("FAILED", three, four, node="n2")
    assert not advance(run)
    assert "exclude" not in cluster.arrays[1].options


def test_the_only_node_that_ran_anything_is_not_excluded(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster)
    assert not advance(run)
    lose(run, cluster, "FAILED", node="n3")
    assert "exclude" not in cluster.arrays[1].options


def test_raised_memory_stays_raised_in_the_next_round(tmp_path: Path, cluster: HandMoved) -> None:
    options = {"client": {"mem": "10G"}}
    run = hand_moved(tmp_path, cluster, rounds=3, scheduler__sbatch=options)
    assert not advance(run)
    lose(run, cluster, "OUT_OF_MEMORY")
    for _ in range(2):
        cluster.work(*cluster.alive)
        assert not advance(run)
    assert [job.options["mem"] for job in cluster.arrays] == ["10G", "15G", "15G", "15G"]


def test_the_error_of_one_task_does_not_stop_a_run_whose_other_tasks_train(
    tmp_path: Path, cluster: HandMoved
) -> None:
    cluster.simulation.limit = 2
    run = hand_moved(tmp_path, cluster, rounds=1)
    assert not advance(run)
    broken, working, *others = cluster.alive
    attempt = paths_of(tmp_path).round(1).attempt(1)
    error = ErrorRecord(kind="UserError", message="no such model here", exit_code=2)
    error.publish(attempt.task_error(broken))
    cluster.work(working)
    cluster.end("FAILED", broken, *others)
    assert not advance(run)
    # an attempt without updates logs it
    again = paths_of(tmp_path).round(1).attempt(2)
    error.publish(again.task_error(next(iter(cluster.alive))))
    cluster.end("FAILED", *cluster.alive)
    with pytest.raises(UserError, match="no such model here"):
        advance(run)


def test_timeouts_and_preemption_are_not_counted_against_a_node(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster)
    assert not advance(run)
    lose(run, cluster, "TIMEOUT")
    assert "exclude" not in cluster.arrays[1].options


def test_workers_that_stop_in_order_are_not_counted_against_a_node(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster)
    assert not advance(run)
    stopped = list(cluster.alive)
    cluster.end("FAILED", *stopped)
    cluster.ended |= {task: Ending(state="FAILED", exit_code="3:0", node="n1") for task in stopped}
    assert not advance(run)
    assert "exclude" not in cluster.arrays[1].options


def test_out_of_memory_asks_for_more_memory_each_time(tmp_path: Path, cluster: HandMoved) -> None:
    say: list[str] = []
    options = {"client": {"mem": "10G"}}
    run = hand_moved(tmp_path, cluster, say, scheduler__sbatch=options)
    assert not advance(run)
    lose(run, cluster, "OUT_OF_MEMORY")
    lose(run, cluster, "OUT_OF_MEMORY")
    assert [job.options["mem"] for job in cluster.arrays] == ["10G", "15G", "23G"]
    assert "class small: out of memory; asking for mem 15G" in say


@pytest.mark.parametrize(("gpus", "second"), [({}, "15G"), ({"gpus": 1}, "10G")])
def test_a_process_without_memory_counts_unless_it_was_gpu_memory(
    tmp_path: Path, cluster: HandMoved, gpus: dict[str, int], second: str
) -> None:
    options = {"client": {"mem": "10G", **gpus}}
    run = hand_moved(tmp_path, cluster, scheduler__sbatch=options)
    assert not advance(run)
    attempt = paths_of(tmp_path).round(1).attempt(1)
    error = ErrorRecord(kind="OutOfMemory", message="memory ran out", exit_code=1)
    error.publish(attempt.task_error(next(iter(cluster.alive))))
    lose(run, cluster, "FAILED")
    assert [job.options["mem"] for job in cluster.arrays] == ["10G", second]


def test_out_of_memory_without_a_limit_to_raise_names_the_key(
    tmp_path: Path, cluster: HandMoved
) -> None:
    say: list[str] = []
    run = hand_moved(tmp_path, cluster, say)
    assert not advance(run)
    lose(run, cluster, "OUT_OF_MEMORY")
    assert any("set scheduler.sbatch.client.mem" in line for line in say)


def test_attempts_without_progress_are_bounded_and_their_endings_logged(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__max_attempts=2)
    assert not advance(run)
    lose(run, cluster, "NODE_FAIL", node="n2")
    cluster.end("NODE_FAIL", *cluster.alive, node="n2")
    with pytest.raises(RunFailed, match=r"after 2 attempts \(.*NODE_FAIL on n2"):
        advance(run)


def test_preemption_never_counts(tmp_path: Path, cluster: HandMoved) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__max_attempts=1)
    assert not advance(run)
    for _ in range(4):
        lose(run, cluster, "PREEMPTED")
    cluster.work(*cluster.alive)
    assert advance(run)


def test_preemption_beside_unneeded_tasks_does_not_count_but_silence_does(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__max_attempts=1)
    for _ in range(3):
        assert not advance(run)
        preempted, *idle = cluster.alive
        cluster.cancel(idle)
        cluster.end("PREEMPTED", preempted)
    assert not advance(run)
    preempted, silent, *idle = cluster.alive
    cluster.cancel([silent, *idle])
    run.observations.cancelled[silent] = "no progress"
    cluster.end("PREEMPTED", preempted)
    with pytest.raises(RunFailed):
        advance(run)


def write_checkpoint(tmp_path: Path, steps: int) -> None:
    identity = CheckpointIdentity(
        run_id="run",
        result_fingerprint="",
        round=1,
        client="a",
        base_fingerprint="",
        data_fingerprint="",
        state_sha256="",
    )
    stats = {"tokens": 1, "loss_tokens": 1, "losses": [1.0] * steps, "seconds": 1.0}
    record = CheckpointRecord.model_validate(
        {
            **stats,
            **{"identity": identity, "steps": steps, "step_seconds": 1.0},
            **{"peak_memory_bytes": 1, "micro_batch_size": 1, "resumed_at": []},
            "environments": [],
        }
    )
    path = paths_of(tmp_path).round(1).checkpoint("a")
    publish_checkpoint(path, Checkpoint(record=record, tensors={}))


def test_a_checkpoint_of_more_steps_is_progress_and_one_written_again_is_none(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster, scheduler__max_attempts=2)
    assert not advance(run)
    for steps in (1, 2, 3):
        write_checkpoint(tmp_path, steps)
        lose(run, cluster, "FAILED")
    for steps in (2, 3):
        write_checkpoint(tmp_path, steps)
        cluster.end("FAILED", *cluster.alive)
        if steps == 2:
            assert not advance(run)
    with pytest.raises(RunFailed, match="after 5 attempts"):
        advance(run)


def test_an_over_sampled_round_goes_on_with_enough_updates(
    tmp_path: Path, cluster: HandMoved
) -> None:
    say: list[str] = []
    cluster.simulation.limit = 4
    run = hand_moved(tmp_path, cluster, say, clients__over_sample=0.5)
    assert not advance(run)
    assert len(cluster.alive) == 6
    cluster.work(next(iter(cluster.alive)))
    assert advance(run)
    collection = CollectionRecord.read(paths_of(tmp_path).round(1).collection)
    assert len(collection.updates) == 4
    assert len(collection.missing) == 2
    assert sum(mix.used for mix in collection.tiers.values()) == 4
    assert sum(mix.drawn for mix in collection.tiers.values()) == 6
    assert len(cluster.cancelled) == 5
    collected = next(line for line in say if "collected" in line)
    assert collected.startswith("round 1: collected 4 of 6 clients (small ")


def test_after_the_deadline_the_quorum_is_enough(tmp_path: Path, cluster: HandMoved) -> None:
    cluster.simulation.limit = 3
    changes: dict[str, Any] = {"clients__quorum": 3, "clients__deadline_minutes": 0.02}
    run = hand_moved(tmp_path, cluster, **changes)
    assert not advance(run)
    cluster.work(next(iter(cluster.alive)))
    assert not advance(run)
    while not advance(run):
        pass
    assert len(CollectionRecord.read(paths_of(tmp_path).round(1).collection).updates) == 3


def test_a_deadline_without_the_quorum_ends_nothing(tmp_path: Path, cluster: HandMoved) -> None:
    cluster.simulation.limit = 2
    changes: dict[str, Any] = {"clients__quorum": 3, "clients__deadline_minutes": NOW}
    run = hand_moved(tmp_path, cluster, **changes)
    assert not advance(run)
    cluster.work(next(iter(cluster.alive)))
    for _ in range(3):
        assert not advance(run)


def test_the_next_round_takes_over_idle_workers(tmp_path: Path, cluster: HandMoved) -> None:
    run = hand_moved(tmp_path, cluster, rounds=2, scheduler__linger_minutes=5)
    assert not advance(run)
    staying, leaving, *others = cluster.alive
    cluster.start(staying, leaving)
    cluster.note(staying, "lingering")
    cluster.note(leaving, "ended")
    cluster.work(*others)
    assert not advance(run)
    plan = SubmissionRecord.read(paths_of(tmp_path).round(2).attempt(1).submission)
    assert plan.adopted == [staying]
    assert sum(job.tasks for job in cluster.arrays) == 4 + 3


def test_lost_bundles_are_planned_again_beside_idle_workers(
    tmp_path: Path, cluster: HandMoved
) -> None:
    cluster.simulation.limit = 3
    run = hand_moved(tmp_path, cluster, scheduler__linger_minutes=5)
    assert not advance(run)
    staying, working, *lost = cluster.alive
    cluster.start(staying)
    cluster.note(staying, "lingering")
    cluster.work(working)
    cluster.end("NODE_FAIL", *lost)
    assert not advance(run)
    plan = SubmissionRecord.read(paths_of(tmp_path).round(1).attempt(2).submission)
    assert (plan.adopted, plan.arrays) == ([staying], [])


def test_memory_is_raised_for_the_class_that_ran_out_of_it(
    tmp_path: Path, cluster: HandMoved
) -> None:
    tiers = {"small": {"ranks": 2}, "large": {"ranks": 4}}
    sbatch = {"tiers": {"large": {"mem": "4G"}}}
    run = hand_moved(tmp_path, cluster, clients__tiers=tiers, scheduler__sbatch=sbatch)
    assert not advance(run)
    names = {job.name.split("-")[-2]: job for job in cluster.arrays}
    assert sorted(names) == ["large", "small"]
    small = [id_ for id_, (job, _) in cluster.alive.items() if job is names["small"]]
    large = [id_ for id_, (job, _) in cluster.alive.items() if job is names["large"]]
    cluster.work(*small)
    cluster.end("OUT_OF_MEMORY", *large)
    assert not advance(run)
    assert {job.name.split("-")[-2]: job.options["mem"] for job in cluster.arrays[2:]} == {
        "large": "6G"
    }


def test_queued_tasks_without_a_bundle_are_cancelled_once_every_bundle_is_claimed(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster)
    assert not advance(run)
    attempt = paths_of(tmp_path).round(1).attempt(1)
    working, requeued, *idle = cluster.alive
    cluster.start(working)
    for bundle, task in enumerate([working, working, requeued]):
        claim = ClaimRecord(bundle=bundle, task=task, node="n1")
        assert claim.publish_once(attempt.claim(bundle))
    assert not advance(run)
    assert cluster.cancelled == []
    assert ClaimRecord(bundle=3, task=working, node="n1").publish_once(attempt.claim(3))
    assert not advance(run)
    assert cluster.cancelled == idle
    assert set(cluster.alive) == {working, requeued}


def test_a_complete_round_leaves_no_queued_task(tmp_path: Path, cluster: HandMoved) -> None:
    run = hand_moved(tmp_path, cluster, rounds=2)
    assert not advance(run)
    first, second, *others = cluster.alive
    cluster.start(second)
    cluster.work(first)
    assert not advance(run)
    assert cluster.cancelled == others
    assert second in cluster.alive


def test_queued_tasks_without_recorded_ids_are_cancelled_with_their_round_too(
    tmp_path: Path, cluster: HandMoved
) -> None:
    run = hand_moved(tmp_path, cluster, rounds=2)
    assert not advance(run)
    first, *others = cluster.alive
    cluster.work(first)
    # as if the coordinator was killed right after sbatch
    close_run(run)
    paths_of(tmp_path).round(1).attempt(1).jobs.unlink()
    run = hand_moved(tmp_path, cluster, rounds=2)
    assert not advance(run)
    assert cluster.cancelled == others


def test_cancel_ends_an_idle_worker_of_an_earlier_round(tmp_path: Path, cluster: HandMoved) -> None:
    run = hand_moved(tmp_path, cluster, rounds=3, scheduler__linger_minutes=5)
    assert not advance(run)
    staying, *others = cluster.alive
    cluster.start(staying)
    cluster.note(staying, "ended")
    cluster.work(*others)
    assert not advance(run)
    cluster.work(*(task for task in cluster.alive if task != staying))
    assert not advance(run)
    assert paths_of(tmp_path).round(2).record.exists()
    cancel_jobs(run.paths, run.config, cluster)
    assert cluster.alive == {}


def test_workers_with_too_little_memory_or_on_a_broken_node_are_not_taken_over(
    tmp_path: Path, cluster: HandMoved
) -> None:
    options = {"client": {"mem": "10G"}}
    linger: dict[str, Any] = {"scheduler__linger_minutes": 5, "scheduler__sbatch": options}
    run = hand_moved(tmp_path, cluster, **linger)
    assert not advance(run)
    staying, lost, *others = cluster.alive
    cluster.start(staying)
    cluster.note(staying, "lingering")
    cluster.end("COMPLETED", *others)
    cluster.end("OUT_OF_MEMORY", lost)
    assert not advance(run)
    plan = SubmissionRecord.read(paths_of(tmp_path).round(1).attempt(2).submission)
    assert (plan.adopted, plan.workers["small"].options["mem"]) == ([], "15G")


def test_an_adopted_worker_that_ran_out_of_memory_counts_for_its_class(
    tmp_path: Path, cluster: HandMoved
) -> None:
    options = {"client": {"mem": "10G"}}
    linger: dict[str, Any] = {"scheduler__linger_minutes": 5, "scheduler__sbatch": options}
    run = hand_moved(tmp_path, cluster, rounds=2, **linger)
    assert not advance(run)
    staying, *others = cluster.alive
    cluster.start(staying)
    cluster.note(staying, "lingering")
    cluster.work(*others)
    assert not advance(run)
    attempt = paths_of(tmp_path).round(2).attempt(1)
    job, state = cluster.alive[staying]
    cluster.alive[staying] = (dataclasses.replace(job, argv=(str(attempt.root),)), state)
    cluster.note(staying, "training")
    cluster.end("COMPLETED", *(task for task in cluster.alive if task != staying))
    cluster.end("OUT_OF_MEMORY", staying)
    assert not advance(run)
    assert OutcomeRecord.read(attempt.outcome).endings[staying].state == "OUT_OF_MEMORY"
    assert cluster.arrays[-1].options["mem"] == "15G"


@pytest.mark.parametrize("ends_by", ["over-sampling", "a deadline"])
def test_an_over_sampled_round_takes_the_same_clients_again_after_damage(
    tmp_path: Path, cluster: HandMoved, ends_by: str
) -> None:
    changes: dict[str, Any] = {"clients__over_sample": 0.5}
    if ends_by == "a deadline":
        changes = {"clients__quorum": 2, "clients__deadline_minutes": NOW}
    cluster.simulation.limit = 4 if ends_by == "over-sampling" else 3
    first: list[CollectionRecord] = []

    def damage_one_and_let_a_late_one_come(program: str, target: Path) -> None:
        if program != "aggregate" or target.name == "0000" or first:
            return
        cluster.simulation.limit = None
        victim = min(target.glob("updates/*.safetensors"))
        first.append(CollectionRecord.read(RoundPaths(root=target).collection))
        attempt = AttemptPaths(root=target / "attempts" / "01", number=1)
        cluster.simulation.work(attempt, "small", "9_9")
        cluster.simulation.work(attempt, "large", "9_9")
        victim.write_bytes(b"")

    cluster.simulation.before = damage_one_and_let_a_late_one_come
    run = hand_moved(tmp_path, cluster, **changes)
    assert not advance(run)
    cluster.work(*cluster.alive)
    for _ in range(10):
        if advance(run):
            break
        cluster.work(*cluster.alive)
    again = CollectionRecord.read(paths_of(tmp_path).round(1).collection)
    assert again.replaces == 1
    assert [u.client for u in again.updates] == [u.client for u in first[0].updates]
