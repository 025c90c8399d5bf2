"""Cluster at the scheduler's seam that a test moves by hand: it decides when clients train."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedllm.config.models import Config
from fedllm.rounds.opening import open_run
from fedllm.rounds.run import Run
from fedllm.scheduling.seam import (
    ONE_PROCESS,
    CancelRefused,
    Capacity,
    Ending,
    Job,
    Limits,
    Option,
    SchedulerFull,
    TaskSize,
    TaskState,
)
from fedllm.storage.paths import AttemptPaths, RunPaths
from fedllm.storage.records import TaskRecord
from tests.rounds.simulation import Simulation, config_of


class HandMoved:
    """Scheduler: jobs of one task run at once; workers wait until the test runs or ends them."""

    def __init__(
        self, simulation: Simulation, *, max_tasks: int | None = None, largest_array: int = 400
    ) -> None:
        self.simulation = simulation
        self.max_tasks = max_tasks
        self.largest_array = largest_array
        self.jobs: list[Job] = []
        self.alive: dict[str, tuple[Job, TaskState]] = {}
        self.ended: dict[str, Ending] = {}
        self.cancelled: list[str] = []
        self.foreign: set[str] = set()
        self.users: dict[str, int] = {}
        self.finds = 0
        self._numbers = itertools.count(1)

    def capacity(self, options: Mapping[str, Option], size: TaskSize = ONE_PROCESS) -> Capacity:
        del size
        return Capacity(
            free_slots=100,
            max_parallel=100,
            largest_array=self.largest_array,
            free_tasks=self.room(options),
        )

    def room(self, options: Mapping[str, Option]) -> int | None:
        del options
        return None if self.max_tasks is None else self.max_tasks - len(self.alive)

    def limits(self, options: Mapping[str, Option]) -> Limits:
        del options
        return Limits(largest_array=self.largest_array, max_submitted=self.max_tasks)

    def script(self, job: Job) -> str | None:
        del job
        return None

    def submit(self, job: Job) -> list[str]:
        if self.max_tasks is not None and len(self.alive) + job.tasks > self.max_tasks:
            raise SchedulerFull("too many jobs")
        self.jobs.append(job)
        array = next(self._numbers)
        ids = [f"{array}_{number}" for number in range(job.tasks)]
        if job.program == "client":
            self.alive |= dict.fromkeys(ids, (job, TaskState.WAITING))
        else:
            self.simulation(job.program, job.argv, ids[0], job.log_folder)
        return ids

    @property
    def arrays(self) -> list[Job]:
        """The arrays of workers."""
        return [job for job in self.jobs if job.program == "client"]

    def start(self, *ids: str, state: TaskState = TaskState.RUNNING) -> None:
        """Set tasks to running, or to another state; they do nothing yet."""
        self.alive |= {id_: (self.alive[id_][0], state) for id_ in ids}

    def note(
        self, task: str, state: str, worker_class: str = "small", clients: Sequence[str] = ()
    ) -> None:
        """Write a worker's heartbeat."""
        folder = Path(self.alive[task][0].argv[0])
        TaskRecord.model_validate(
            {
                "task": task,
                "node": "n1",
                "clients_done": 0,
                "client": clients[0] if clients else None,
                "clients": clients,
                "step": 3 if clients else 0,
                "state": state,
                "worker_class": worker_class,
            }
        ).publish(AttemptPaths(root=folder, number=int(folder.name)).task(task))

    def work(self, *ids: str) -> None:
        """Run tasks: they train all clients that they can claim, then end."""
        for id_ in ids:
            job, _ = self.alive.pop(id_)
            self.simulation(job.program, job.argv, id_, job.log_folder)

    def end(self, state: str, *ids: str, node: str = "n1") -> None:
        """End tasks before they did anything."""
        for id_ in ids:
            del self.alive[id_]
            self.ended[id_] = Ending(state=state, node=node)

    def find(self, name: str) -> list[str] | None:
        self.finds += 1
        found = [id_ for id_, (job, _) in self.alive.items() if job.name == name]
        return found or None

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        return {id_: self.alive[id_][1] if id_ in self.alive else TaskState.GONE for id_ in ids}

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        return {id_: self.ended[id_] for id_ in ids if id_ in self.ended}

    def attribute(self, ids: Sequence[str], user: int) -> None:
        self.users |= dict.fromkeys(ids, user)

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(ids, "Resources")

    def trouble(self) -> str | None:
        return None

    def check(self, jobs: Sequence[Job]) -> None:
        del jobs

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        if refused := self.foreign & {*ids}:
            raise CancelRefused(f"scancel: {', '.join(sorted(refused))}: permission denied")
        waiting = {id_ for id_, (_, state) in self.alive.items() if state is TaskState.WAITING}
        ids = [id_ for id_ in ids if not only_waiting or id_ in waiting]
        self.cancelled += ids
        for id_ in ids:
            if self.alive.pop(id_, None):
                self.ended[id_] = Ending(state="CANCELLED")

    def wait(self, seconds: float) -> None:
        del seconds

    def close(self) -> None:
        return


def hand_moved(
    root: Path,
    cluster: HandMoved,
    say: list[str] | None = None,
    *,
    unattended: bool = False,
    **changes: object,
) -> Run:
    """Open a run of the simulated federation on a hand-moved cluster."""
    config: Config = config_of(
        **{
            "scheduler__query_seconds": 1e-6,
            "scheduler__worker_minutes_min": 1e-6,
            "scheduler__clients_per_bundle": 1,
            "evaluation__every": 0,
            "rounds": 1,
            **changes,
        }
    )
    heard = [] if say is None else say
    return open_run(
        root,
        config,
        make_scheduler=lambda _paths, _config: cluster,
        say=heard.append,
        unattended=unattended,
    )


def paths_of(root: Path) -> RunPaths:
    """Return a run's paths."""
    return RunPaths(root=root.resolve())
