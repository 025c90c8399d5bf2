"""Jobs run in the caller's process, one after the other, the moment they are submitted."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.scheduling.seam import Job, TaskState

Execute = Callable[[str, Sequence[str], str, Path], int]


@dataclass(kw_only=True)
class InlineScheduler:
    """`execute(program, argv, task id, log)` is the caller's: this side knows no compute code."""

    execute: Execute
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))
    _exits: dict[str, int] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        """One process, one slot."""
        return 1

    def submit(self, job: Job) -> list[str]:
        """Run every task of the array now."""
        ids = [f"inline-{next(self._numbers)}" for _ in range(job.tasks)]
        for task in ids:
            log = job.log_folder / "inline.log"
            self._exits[task] = self.execute(job.program, job.argv, task, log)
        return ids

    def find(self, name: str) -> list[str] | None:  # noqa: ARG002
        """Nothing outlives the process that submitted it."""
        return None

    def states(self, ids: Sequence[str]) -> dict[str, TaskState]:
        """Every task ended before its submission returned."""
        return dict.fromkeys(ids, TaskState.GONE)

    def reasons(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the exit codes of tasks that failed."""
        return {i: f"exit {self._exits[i]}" for i in ids if self._exits.get(i)}

    def cancel(self, ids: Sequence[str]) -> None:
        """There is nothing to end."""

    def wait(self, seconds: float) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """There is nothing to end."""
