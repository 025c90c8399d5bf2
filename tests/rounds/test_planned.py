"""A plan has all that a run would submit, queries only for room, and writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.models import Config
from fedllm.errors import ConfigError
from fedllm.planning.capacity import ONE_PROCESS, Capacity, TaskSize
from fedllm.rounds.dispatch.planned import RunPlan, plan_run
from fedllm.scheduling.inline import InlineScheduler
from fedllm.scheduling.seam import Limits, Option, Scheduler, SchedulerUnreachable
from fedllm.scheduling.slurm.executor import SlurmScheduler
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import PreparedRecord
from tests.rounds.simulation import Simulation, config_of

TWO = Capacity(free_slots=2, max_parallel=2, largest_array=400)
SLOW = {"scheduler__clients_per_bundle": 1, "scheduler__worker_teraflops": 1e-3}


@dataclass(kw_only=True)
class Asked(InlineScheduler):
    """Scheduler that returns a capacity, or fails to."""

    answer: Capacity | Exception

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        del options, size
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Scripts(SlurmScheduler):
    """Slurm scheduler that writes the real scripts without a queue."""

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        del options, size
        return TWO

    def limits(self, options: Mapping[str, Option]) -> Limits:  # noqa: ARG002
        return Limits(problem="no scheduler")


def planned(
    folder: Path, answer: Capacity | Exception, *, slots: int | None = None, **changes: Any
) -> RunPlan:
    config = config_of(**SLOW, **changes)
    return plan_in(folder, config, Asked(execute=Simulation(), answer=answer), slots=slots)


def plan_in(
    folder: Path, config: Config, scheduler: Scheduler, *, slots: int | None = None
) -> RunPlan:
    Simulation().prepare(RunPaths(root=folder / "prepared"))
    prepared = PreparedRecord.read(RunPaths(root=folder / "prepared").prepared)
    # minutes a client: more than a worker's start
    prepared = prepared.model_copy(update={"model_parameters": 1_000_000_000})
    run = RunPaths(root=folder / "run")
    found = plan_run(config, prepared, run, scheduler, slots=slots)
    assert not run.root.exists()
    return found


def test_a_plan_takes_what_the_scheduler_has_room_for(tmp_path: Path) -> None:
    found = planned(tmp_path, TWO)
    assert found.geometry.tasks == 2
    assert found.geometry.room.problem == "scheduler.kind inline has no queue"
    assert found.scripts == ()


def test_a_plan_for_other_slots_uses_them(tmp_path: Path) -> None:
    found = planned(tmp_path, TWO, slots=3)
    assert found.geometry.tasks == 3
    assert max(each.slots for each in found.geometry.times) == 12


def test_a_plan_needs_no_scheduler(tmp_path: Path) -> None:
    unreachable = SchedulerUnreachable("no answer")
    found = planned(tmp_path, unreachable, scheduler__max_parallel=3)
    assert found.geometry.tasks == 3
    assert max(each.slots for each in found.geometry.times) == 12


def test_a_refused_option_stops_a_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such partition"):
        planned(tmp_path, ConfigError("no such partition"))


def test_the_sbatch_files_are_those_of_all_jobs_and_the_options_are_read_from_them(
    tmp_path: Path,
) -> None:
    sbatch = {"default": {"partition": "low"}, "client": {"mem": "3G"}, "aggregate": {"time": 5}}
    config = config_of(**SLOW, scheduler__kind="slurm", scheduler__sbatch=sbatch)
    found = plan_in(tmp_path, config, Scripts(section=config.scheduler))
    assert found.geometry.room.problem == "no scheduler"
    names = [script.job.name for script in found.scripts]
    assert names == [
        "r01-train-fedllm-plan-a01-small-0",
        "r00-prepare-fedllm-plan-a01",
        "r01-aggregate-fedllm-plan-a01",
        "r01-evaluate-fedllm-plan-a01",
    ]
    assert all(script.text.startswith("#!") for script in found.scripts)
    (array,) = found.geometry.arrays
    assert (array.options["partition"], array.options["mem"]) == ("low", "3G")
    jobs = {job.kind: job.options for job in found.geometry.jobs}
    assert jobs["aggregate"]["time"] == "5"
    assert jobs["coordinator"]["partition"] == "low"
    assert not {"array", "job-name", "output"} & set(array.options)
