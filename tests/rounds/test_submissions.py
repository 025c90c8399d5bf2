"""What a scheduler refuses is mended in the configuration, and the run goes on."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from fedllm.rounds.coordinate import coordinate
from fedllm.rounds.opening import open_run
from fedllm.scheduling.inline import InlineScheduler
from fedllm.scheduling.seam import Job
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import CohortRecord, JobsRecord
from tests.rounds.simulation import Simulation, complete, config_of, states

TIERS = "scheduler__sbatch__tiers"


@dataclass(kw_only=True)
class Picky(InlineScheduler):
    """Takes no job for partition `nope`, as sbatch would not."""

    def submit(self, job: Job) -> list[str]:
        if job.options.get("partition") == "nope":
            raise ConfigError("partition: nope: refused")
        return super().submit(job)


def run(root: Path, **changes: object) -> Simulation:
    simulation = Simulation()
    opened = open_run(
        root,
        config_of(**changes),
        make_scheduler=lambda _paths, _config: Picky(execute=simulation),
        say=simulation.log,
    )
    coordinate(opened)
    return simulation


def test_a_plan_that_was_refused_as_a_whole_is_made_anew(tmp_path: Path) -> None:
    complete(tmp_path / "other", Simulation())
    root = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(ConfigError):
            run(root, scheduler__sbatch__client__partition="nope")
    run(root, scheduler__sbatch__client__partition="there")
    assert states(root) == states(tmp_path / "other")
    assert not RunPaths(root=root).round(1).attempt(2).root.exists()


@pytest.mark.parametrize(("refused", "taken"), [("small", {"large"}), ("large", set())])
def test_of_a_plan_that_was_refused_in_part_the_arrays_taken_before_count(
    tmp_path: Path, refused: str, taken: set[str]
) -> None:
    complete(tmp_path / "other", Simulation())
    root = tmp_path / "run"
    right = {f"{TIERS}__{tier}__partition": f"for {tier}" for tier in ("small", "large")}
    with pytest.raises(ConfigError):
        run(root, **right | {f"{TIERS}__{refused}__partition": "nope"})
    jobs = JobsRecord.find(RunPaths(root=root).round(1).attempt(1).jobs)
    assert {name.split("-")[-2] for name in (jobs.ids if jobs else ())} == taken
    again = run(root, **right)
    assert states(root) == states(tmp_path / "other")
    assert {tier(root, client) for number, client in again.trained if number == 1} == (
        {"small", "large"} - taken
    )


def tier(root: Path, client: str) -> str:
    cohort = CohortRecord.read(RunPaths(root=root).round(1).cohort)
    return next(member.tier for member in cohort.clients if member.id == client)
