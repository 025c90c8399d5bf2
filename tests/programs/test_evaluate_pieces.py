"""An evaluation is shared by any number of tasks, and its scores are the same bits."""

import shutil
from pathlib import Path

import pytest

from fedllm.cli.execution import start
from fedllm.planning.evaluation_targets import bundles_of
from fedllm.process.session import Session
from fedllm.programs.evaluate_pieces import Evaluation, evaluate_pieces
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.kept_records import AnswersRecord, PartRecord, TasksRecord
from fedllm.storage.paths import PackedJobPaths, RoundPaths, RunPaths
from fedllm.storage.records import EvaluationRecord, SubmissionRecord
from tests.cli.commands import in_process
from tests.tiny import Tiny

# ten clients of ten test rows each, and pieces of 16 rows at most
PIECES = ("data.test_fraction=0.5", "evaluation.rows_per_client=null", "evaluation.batch_size=1")


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    overrides = ["rounds=1", "training.learning_rate=0.05", *PIECES]
    return RunPaths(root=start(tiny.config, overrides, tmp_path_factory.mktemp("e") / "run"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


def task(number: int) -> TaskIdentity:
    return TaskIdentity(task=f"77_{number}", node="n1", log="")


def copied(run: RunPaths, root: Path) -> RoundPaths:
    """Return round 1 of a copy of the run, not evaluated yet."""
    shutil.copytree(run.root, root)
    paths = RunPaths(root=root).round(1)
    shutil.rmtree(paths.evaluation.root)
    return paths


def planned(paths: RoundPaths, session: Session, number: int = 1) -> PackedJobPaths:
    """Publish the plan of an attempt."""
    job = paths.evaluation_job(number)
    pieces = Evaluation.open(paths.root, session).pieces
    plan = SubmissionRecord(
        token="t", lease=1, kind="evaluate", command=[], arrays=[], bundles=bundles_of(pieces)
    )
    plan.publish(job.submission)
    return job


def test_tasks_take_turns_and_the_one_that_ends_last_joins_the_parts(
    run: RunPaths, session: Session, tmp_path: Path
) -> None:
    whole = EvaluationRecord.read(run.round(1).evaluation_record)
    paths = copied(run, tmp_path / "run")
    job = planned(paths, session)
    pieces = len(Evaluation.open(paths.root, session).pieces)
    assert pieces == 10
    # the claims of a task that is still at work
    for number in (2, 5):
        job.claim(number).parent.mkdir(exist_ok=True)
        job.claim(number).write_text(f'{{"bundle": {number}, "task": "77_1", "node": "n2"}}')
    assert evaluate_pieces(paths.root, session, task(0), job=job) is None
    assert not paths.evaluation_record.exists()
    assert len(paths.evaluation.part_files()) == pieces - 2
    # it goes on with what it holds, after it was requeued
    record = evaluate_pieces(paths.root, session, task(1), job=job)
    assert record is not None
    assert record.clients == EvaluationRecord.read(paths.evaluation_record).clients == whole.clients
    parts = [PartRecord.read(path) for path in paths.evaluation.part_files()]
    assert [part.task for part in parts].count("77_1") == 2
    kept, expected = AnswersRecord.read(paths.answers), AnswersRecord.read(run.round(1).answers)
    assert kept.answers == expected.answers


def test_what_a_lost_task_held_is_scored_by_the_next_attempt_alone(
    run: RunPaths, session: Session, tmp_path: Path
) -> None:
    paths = copied(run, tmp_path / "run")
    job = planned(paths, session)
    job.claim(3).parent.mkdir(exist_ok=True)
    job.claim(3).write_text('{"bundle": 3, "task": "77_1", "node": "lost"}')
    assert evaluate_pieces(paths.root, session, task(0), job=job) is None
    before = {path: path.stat().st_mtime_ns for path in paths.evaluation.part_files()}
    counted: list[int] = []
    record = evaluate_pieces(
        paths.root,
        session,
        TaskIdentity(task="78_0", node="n1", log=""),
        lambda _what, done, _total: counted.append(done),
        planned(paths, session, 2),
    )
    assert record is not None
    assert record.clients == EvaluationRecord.read(run.round(1).evaluation_record).clients
    assert max(counted) <= 20
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_part_that_is_damaged_or_of_another_state_is_scored_again(
    run: RunPaths, session: Session, tmp_path: Path
) -> None:
    paths = copied(run, tmp_path / "run")
    evaluate_pieces(paths.root, session)
    expected = EvaluationRecord.read(paths.evaluation_record)
    paths.evaluation_record.unlink()
    damaged, other = paths.evaluation.part_files()[:2]
    damaged.write_text("{")
    part = PartRecord.read(other)
    wrong = [each.model_copy(update={"client": "nobody"}) for each in part.clients]
    part.model_copy(update={"key": "another", "clients": wrong}).publish(other)
    record = evaluate_pieces(paths.root, session)
    assert record is not None
    assert record.clients == expected.clients
    assert PartRecord.read(other).key != "another"


def test_local_workers_share_evaluations_and_give_the_bits_of_one_process(
    run: RunPaths, tiny: Tiny, tmp_path: Path
) -> None:
    overrides = ["rounds=1", "training.learning_rate=0.05", *PIECES, "scheduler.kind=local"]
    shared = RunPaths(root=start(tiny.config, overrides, tmp_path / "run"))
    expected = EvaluationRecord.read(run.round(1).evaluation_record).clients
    assert EvaluationRecord.read(shared.round(1).evaluation_record).clients == expected
    plan = SubmissionRecord.read(shared.round(1).evaluation_job(1).submission)
    assert [array.tasks for array in plan.arrays] == [2]
    times = TasksRecord.read(shared.round(1).tasks).tasks
    scorers = [task for task in times if task.kind == "evaluate"]
    assert 1 <= len(scorers) <= 2
    assert all(task.started <= task.ended and task.busy_seconds > 0 for task in scorers)
    assert not shared.round(1).evaluation.parts.exists()

    done = in_process("evaluate", shared.root, "--json")
    assert done.returncode == 0, done.stderr
    assert EvaluationRecord.model_validate_json(done.stdout).clients == expected
    (asked,) = shared.all_requested()
    # asked again: it is there already
    before = asked.record.stat().st_mtime_ns
    again = in_process("evaluate", shared.root, "--json")
    assert again.stdout == done.stdout
    assert asked.record.stat().st_mtime_ns == before
