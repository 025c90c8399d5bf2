"""A dry run names, job for job, what the first round submits."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedllm.planning.capacity import ONE_PROCESS, Capacity, TaskSize
from fedllm.rounds.coordinate import coordinate
from fedllm.rounds.dispatch.dry_run import dry_run_jobs, plan_first_round
from fedllm.rounds.opening import open_run
from fedllm.scheduling.inline import InlineScheduler
from fedllm.scheduling.seam import Job, Option
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import PreparedRecord, RunRecord
from tests.rounds.simulation import Simulation, config_of


@dataclass(kw_only=True)
class Recorder(InlineScheduler):
    """Inline scheduler that has room for ten tasks and keeps the jobs it was given."""

    taken: list[Job] = field(default_factory=list)

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        del size
        memory = options.get("mem")
        return Capacity(free_slots=10, max_parallel=10, largest_array=3 if memory else 10)

    def submit(self, job: Job) -> list[str]:
        self.taken.append(job)
        return super().submit(job)


def test_everything_that_the_first_round_submits_is_in_the_dry_run(tmp_path: Path) -> None:
    config = config_of(
        rounds=1,
        scheduler__kind="slurm",
        scheduler__clients_per_bundle="auto",
        scheduler__worker_teraflops=1e-6,
        scheduler__sbatch={
            "default": {"partition": "low"},
            "tiers": {"large": {"mem": "3G"}},
            "aggregate": {"time": 5},
        },
        storage__visibility_seconds=0.0,
    )
    scheduler = Recorder(execute=Simulation())
    coordinate(
        open_run(
            tmp_path, config, make_scheduler=lambda _paths, _config: scheduler, say=lambda _: None
        )
    )
    run = RunPaths(root=tmp_path)
    dry_run = plan_first_round(config, PreparedRecord.read(run.prepared), run, scheduler.capacity)
    planned = {job.name: job for job in dry_run_jobs(dry_run, run)}
    run_id = RunRecord.read(run.run).run_id
    submitted = {
        name: replace(job, name=name)
        for job in scheduler.taken
        if (name := job.name.replace(run_id, "plan"))
        and (name.startswith("r01-") or job.program == "prepare")
    }
    assert {job.program for job in submitted.values()} == {
        "prepare",
        "client",
        "aggregate",
        "evaluate",
    }
    assert planned == submitted
