"""The record of a sweep: its runs, written before the first of them starts."""

from typing import Any, Literal

from pydantic import Field

from fedllm.storage.records import Record


class SweepRunRecord(Record):
    """A run of a sweep.

    `name` is its directory below the sweep's. `config` is its configuration; the learning rate of
    a result in it holds until the arm's tuning has chosen one. `rate` is the rate that a tuning
    run tries.
    """

    name: str
    arm: str
    phase: Literal["tuning", "run"]
    config: dict[str, Any]
    rate: float | None = None


class SweepRecord(Record):
    """A sweep: its runs in the order in which they start.

    `comparison` are the keys of the comparison, `noise_of` is the arm that the A/A arm repeats.
    With a batch system at most `max_parallel` tasks of all runs are queued at once. Methods of the
    user's own are looked for in `code_folders`. `sweep_id` is in the name of its coordinator's job.
    `seals` are those of the last user who gave or accepted the keys that hold commands.
    """

    runs: list[SweepRunRecord]
    sweep_id: str = ""
    code_folders: list[str] = Field(default_factory=list)
    comparison: dict[str, Any] = Field(default_factory=dict)
    noise_of: str | None = None
    max_parallel: int | None = None
    seals: dict[str, str] = Field(default_factory=dict)

    def arms(self) -> list[str]:
        """Return the arms in their order."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    def tuning_of(self, arm: str) -> list[SweepRunRecord]:
        """Return the tuning runs of an arm."""
        return [run for run in self.runs if run.arm == arm and run.phase == "tuning"]
