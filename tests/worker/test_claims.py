"""Claims: a bundle is claimed once, a task's own first, then the longest that fits its time."""

import threading
from pathlib import Path

import pytest

from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.scheduling.environment import TaskIdentity
from fedllm.storage.paths import AttemptPaths
from fedllm.storage.records import ArrayRecord, BundleRecord, ClaimRecord, SubmissionRecord
from fedllm.worker.claims import Claims
from fedllm.worker.task import WorkerTask, array_of


def me(number: int = 1, array: str = "") -> TaskIdentity:
    return TaskIdentity(task=f"7_{number}", node="n1", log="", array=array)


def a_plan(*costs: float, one_bundle: bool = False) -> SubmissionRecord:
    return SubmissionRecord(
        token="t",
        lease=1,
        kind="client",
        command=[],
        arrays=[],
        bundles=[
            BundleRecord(number=n, worker_class="gpu", clients=[f"c{n}"], cost=cost)
            for n, cost in enumerate(costs)
        ],
        one_bundle=one_bundle,
    )


def the_claims(
    folder: Path, plan: SubmissionRecord, who: TaskIdentity, *, restarted: bool = False
) -> Claims:
    attempt = AttemptPaths(root=folder, number=1)
    return Claims(attempt, plan, "gpu", who, restarted=restarted)


def all_of(claims: Claims, seconds_left: float | None = None) -> list[int]:
    taken = []
    while claimed := claims.next(seconds_left):
        taken.append(claimed.bundle.number)
    return taken


def test_a_worker_takes_all_bundles_longest_first(tmp_path: Path) -> None:
    assert all_of(the_claims(tmp_path, a_plan(1, 3, 2), me())) == [1, 2, 0]
    assert all_of(the_claims(tmp_path, a_plan(1, 3, 2), me(2))) == []


def test_a_requeued_task_goes_on_with_its_own_before_it_takes_more(tmp_path: Path) -> None:
    plan = a_plan(1, 2, 3, 4)
    mine, other = the_claims(tmp_path, plan, me()), the_claims(tmp_path, plan, me(2))
    assert mine.next(None) and other.next(None) and mine.next(None)
    again = the_claims(tmp_path, plan, me(), restarted=True)
    found = [again.next(None) for _ in range(3)]
    assert [(c.bundle.number, c.begun_before) for c in found if c] == [
        (3, True),
        (1, True),
        (0, False),
    ]
    assert not again.is_any_left()


def test_of_single_bundles_a_task_takes_one_ever(tmp_path: Path) -> None:
    plan = a_plan(1, 2, one_bundle=True)
    assert all_of(the_claims(tmp_path, plan, me())) == [1]
    again = the_claims(tmp_path, plan, me(), restarted=True)
    assert all_of(again) == [1]
    assert not again.is_any_left()
    assert all_of(the_claims(tmp_path, plan, me(2))) == [0]


def test_with_little_time_left_shorter_bundles_are_taken_or_none(tmp_path: Path) -> None:
    claims = the_claims(tmp_path, a_plan(10, 30, 20), me())
    assert all_of(claims, seconds_left=25) == [2, 0]
    assert claims.is_any_left()
    assert all_of(claims) == [1]


def test_a_held_bundle_goes_on_however_little_time_is_left(tmp_path: Path) -> None:
    assert the_claims(tmp_path, a_plan(10), me()).next(None)
    again = the_claims(tmp_path, a_plan(10), me(), restarted=True)
    assert all_of(again, seconds_left=0) == [0]


def test_workers_that_start_together_take_every_bundle_once(tmp_path: Path) -> None:
    plan = a_plan(*range(60))
    start = threading.Barrier(8)
    taken: dict[int, list[int]] = {}

    def worker(number: int) -> None:
        claims = the_claims(tmp_path, plan, me(number))
        start.wait()
        taken[number] = all_of(claims)

    threads = [threading.Thread(target=worker, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n for numbers in taken.values() for n in numbers) == list(range(60))
    for number, numbers in taken.items():
        for bundle in numbers:
            claim = ClaimRecord.read(AttemptPaths(root=tmp_path, number=1).claim(bundle))
            assert claim.task == f"7_{number}"


def test_the_claims_of_others_cost_one_listing_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = a_plan(*range(900, 0, -1))
    attempt = AttemptPaths(root=tmp_path, number=1)
    for number in range(899):
        path = attempt.claim(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    looked: list[Path] = []
    exists = Path.exists

    def noted(path: Path) -> bool:
        looked.append(path)
        return exists(path)

    monkeypatch.setattr(Path, "exists", noted)
    claimed = the_claims(tmp_path, plan, me()).next(None)
    assert claimed
    assert claimed.bundle.number == 899
    assert len(looked) == 1


def limited(minutes: float | None, **more: float) -> WorkerTask:
    array = ArrayRecord(name="a", worker_class="gpu", tasks=1, minutes=minutes)
    task = WorkerTask(
        attempt=AttemptPaths(root=Path("nowhere"), number=1),
        identity=me(),
        worker_class="gpu",
        session=Session(),
        signals=StopSignals(),
        array=array,
    )
    task.began -= more.get("passed", 0.0)
    return task


@pytest.mark.parametrize(
    ("minutes", "passed", "left"),
    [(None, 0.0, None), (60.0, 0.0, 3510.0), (60.0, 3000.0, 510.0), (2.0, 0.0, 102.0)],
)
def test_time_left_keeps_a_margin(minutes: float | None, passed: float, left: float | None) -> None:
    assert limited(minutes, passed=passed).seconds_left() == pytest.approx(left, abs=1.0)
    assert limited(1.0, passed=600.0).seconds_left() == 0.0


def test_a_task_has_the_time_limit_of_its_own_array() -> None:
    plan = a_plan(1).model_copy(
        update={
            "arrays": [
                ArrayRecord(name="r-gpu-0", worker_class="gpu", tasks=1, minutes=30),
                ArrayRecord(name="r-gpu-1", worker_class="gpu", tasks=1, minutes=20),
                ArrayRecord(name="r-cpu-0", worker_class="cpu", tasks=1, minutes=5),
            ]
        }
    )
    found = [array_of(plan, "gpu", me(array=name)) for name in ("r-gpu-0", "r-gpu-1", "another")]
    assert [array.minutes if array else None for array in found] == [30, 20, 20]
    assert array_of(plan, None, me()) is None
