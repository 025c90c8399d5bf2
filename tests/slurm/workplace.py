"""A scheduler on a development cluster, with a program that tells what it was told."""

import json
from pathlib import Path
from typing import Any

from fedllm.config.models import SchedulerSection
from fedllm.scheduling.seam import Job, TaskState
from fedllm.scheduling.slurm.executor import SlurmScheduler
from tests.slurm.cluster import program, until

# What a task is told, then as long as it is asked to stay, then its exit code.
CLIENT = """
import json, os, pathlib, sys, time
folder, seconds, code = sys.argv[1:4]
print("hello from", os.environ["FEDLLM_TASK"], flush=True)
ours = ("FEDLLM_", "SLURM_", "HF_", "GLIBC_")
told = {name: value for name, value in os.environ.items() if name.startswith(ours)}
starts = os.environ.get("SLURM_RESTART_COUNT", "0")
pathlib.Path(folder, os.environ["FEDLLM_TASK"] + "." + starts).write_text(json.dumps(told))
time.sleep(float(seconds))
sys.exit(int(code))
"""


class Workplace:
    """A run directory, with a space in its name, and a scheduler on the cluster."""

    def __init__(self, root: Path, *, run: str = "run of mine", **section: Any) -> None:
        self.told = root / "told"
        self.logs = root / run / "logs"
        self.jobs = root / "jobs"
        self.told.mkdir(exist_ok=True)
        program(self.jobs, "client", CLIENT)
        self.section = SchedulerSection(**{"query_seconds": 1e-6, **section})
        self.scheduler = SlurmScheduler(section=self.section, jobs_folder=self.jobs)

    def job(
        self, name: str, *, tasks: int = 1, seconds: float = 0, code: int = 0, **options: Any
    ) -> Job:
        argv = (str(self.told), str(seconds), str(code))
        given = {"mem": 100, **options}
        return Job(
            name=name, program="client", argv=argv, tasks=tasks, log_folder=self.logs, options=given
        )

    def states(self, ids: list[str]) -> set[TaskState]:
        return set(self.scheduler.states(ids).values())

    def until_gone(self, ids: list[str]) -> None:
        until(lambda: self.states(ids) == {TaskState.GONE})

    def until_started(self, task: str, *, start: int = 0) -> dict[str, str]:
        path = self.told / f"{task}.{start}"
        until(lambda: path.exists() and path.stat().st_size)
        found: dict[str, str] = json.loads(path.read_text())
        return found
