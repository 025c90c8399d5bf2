"""A run directory that was copied or moved: another run, with all results of the first."""

import shutil
from pathlib import Path

import pytest

from fedllm.cli.control.cancel import cancel
from fedllm.errors import LeaseError
from fedllm.rounds.dispatch.cancelling import cancel_jobs
from fedllm.rounds.opening import close_run, open_run
from fedllm.scheduling.inline import InlineScheduler
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, PreparedRecord, RunRecord
from tests.rounds.simulation import Simulation, complete, config_of, opened, states

COHORT = 4


@pytest.fixture
def half(tmp_path: Path) -> RunPaths:
    """A run whose second round misses clients; its coordinator was stopped."""
    simulation = Simulation()
    simulation.limit = COHORT + 2
    with pytest.raises(Exception, match="no update from"):
        complete(tmp_path / "run", simulation)
    return RunPaths(root=tmp_path / "run")


def copied(run: RunPaths) -> RunPaths:
    shutil.copytree(run.root, run.root.with_name("copy"))
    return RunPaths(root=run.root.with_name("copy"))


def test_a_copy_goes_on_as_another_run_with_the_results_of_the_first(half: RunPaths) -> None:
    copy = copied(half)
    lines: list[str] = []
    simulation = Simulation(log=lines.append)
    complete(copy.root, simulation)
    record, first = RunRecord.read(copy.run), RunRecord.read(half.run)
    assert record.run_id != first.run_id
    assert record.earlier_ids == [first.run_id]
    assert lines[0].startswith(f"{copy.root}: a copy of {half.root}, or moved from there")
    # the updates that were there count: only the missing clients trained
    missing = len(CohortRecord.read(copy.round(2).cohort).clients) - 2
    assert len(simulation.trained) == missing
    complete(half.root, Simulation())
    assert states(copy.root) == states(half.root)
    assert RunRecord.read(half.run).run_id == first.run_id


def test_a_moved_run_goes_on_where_it_is(half: RunPaths) -> None:
    moved = half.root.rename(half.root.with_name("moved"))
    complete(moved, Simulation())
    complete(half.root, Simulation())
    assert states(moved) == states(half.root)


def test_no_job_of_the_original_is_a_job_of_the_copy(
    half: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(half.root, Simulation())
    copy = copied(half)
    cancel(copy.root)
    assert "no job of its own" in capsys.readouterr().out
    run.lease.check()
    asked: list[str] = []

    class Asked(InlineScheduler):
        def states(self, ids):  # type: ignore[no-untyped-def]
            asked.extend(ids)
            return super().states(ids)

        def find(self, name: str) -> None:
            asked.append(name)

    scheduler = Asked(execute=Simulation())
    of_copy = open_run(
        copy.root, config_of(), make_scheduler=lambda _p, _c: scheduler, say=lambda _line: None
    )
    assert cancel_jobs(copy, config_of(), scheduler) == 0
    assert asked == []
    run.lease.check()
    close_run(of_copy)
    close_run(run)


def test_a_coordinator_that_wakes_up_replaces_no_frozen_record(half: RunPaths) -> None:
    run = opened(half.root, Simulation())
    cohort = CohortRecord.read(half.round(2).cohort)
    with pytest.raises(LeaseError, match=r"cohort\.json: another coordinator has written it"):
        run.freeze(cohort.model_copy(update={"clients": []}), half.round(2).cohort)
    assert CohortRecord.read(half.round(2).cohort) == cohort
    close_run(run)


def test_a_run_whose_cache_was_purged_prepares_again(half: RunPaths) -> None:
    prepared = PreparedRecord.read(half.prepared)
    prepared.model_copy(update={"data_path": str(half.root / "gone")}).publish(half.prepared)
    complete(half.root, Simulation())
    assert PreparedRecord.read(half.prepared).data_path == prepared.data_path
