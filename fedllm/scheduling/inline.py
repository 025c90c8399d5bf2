"""The inline scheduler: jobs run in the caller's process, one after the other, when submitted."""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.errors import ConfigError
from fedllm.scheduling.seam import (
    ONE_PROCESS,
    Capacity,
    Ending,
    Job,
    Limits,
    Option,
    TaskSize,
    TaskState,
)

Execute = Callable[[str, Sequence[str], str, Path], int]


@dataclass(kw_only=True)
class InlineScheduler:
    """Scheduler that runs each task during its submission, in this process.

    The caller gives `execute(program, argv, task id, log)`, because this side has no compute code.
    """

    execute: Execute
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _exits: dict[str, int] = field(default_factory=dict)

    def capacity(
        self,
        options: Mapping[str, Option],  # noqa: ARG002
        size: TaskSize = ONE_PROCESS,  # noqa: ARG002
    ) -> Capacity:
        """Return one slot: there is one process."""
        return Capacity(free_slots=1, max_parallel=1, largest_array=sys.maxsize, resident=True)

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse tasks of several processes."""
        for job in jobs:
            if job.processes_per_task > 1:
                raise ConfigError(
                    f"scheduler.kind: inline runs a task in one process, {job.name} has "
                    f"{job.processes_per_task}; need local or slurm"
                )

    def room(self, options: Mapping[str, Option]) -> int | None:  # noqa: ARG002
        """Return None: nothing limits the queue."""
        return None

    def limits(self, options: Mapping[str, Option]) -> Limits:  # noqa: ARG002
        """Return no limits: there is no queue."""
        return Limits(problem="scheduler.kind inline has no queue")

    def script(self, job: Job) -> None:
        """Return None: no batch system reads a script."""

    def submit(self, job: Job) -> list[str]:
        """Run every task of the array now; return the task ids."""
        self.check([job])
        ids = [f"inline-{next(self._numbers)}" for _ in range(job.tasks)]
        for task in ids:
            log = job.log_folder / "inline.log"
            self._exits[task] = self.execute(job.program, job.argv, task, log)
        return ids

    def find(self, name: str) -> list[str] | None:  # noqa: ARG002
        """Return None: no task outlives the process that submitted it."""
        return None

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Return GONE for every task: it ended before `submit` returned."""
        return dict.fromkeys(ids, TaskState.GONE)

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return the exit codes of tasks that failed."""
        return {i: Ending(state=f"exit {self._exits[i]}") for i in ids if self._exits.get(i)}

    def attribute(self, ids: Sequence[str], user: int) -> None:
        """Do nothing: its jobs end before anybody else asks."""

    def waiting_for(self, ids: Sequence[str]) -> dict[str, str]:  # noqa: ARG002
        """Return nothing: no task waits."""
        return {}

    def trouble(self) -> str | None:
        """Return None: the states of tasks are always known."""
        return None

    def cancel(self, ids: Sequence[str], *, only_waiting: bool = False) -> None:
        """Do nothing: no task is running."""

    def wait(self, seconds: float) -> None:
        """Return at once: no task is running."""

    def close(self) -> None:
        """Do nothing: no task is running."""
