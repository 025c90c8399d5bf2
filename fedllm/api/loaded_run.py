"""Runs as data frames: what the files of a run directory record, without training anything."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import RunDirectoryError, counted
from fedllm.reporting.results import run_rows
from fedllm.reporting.results.metrics import metric_rows
from fedllm.storage.paths import RunPaths

if TYPE_CHECKING:
    import pandas as pd


class LoadedRun:
    """A run directory, read when a frame is first used; a finished run or an unfinished one.

    Every frame has a column `round`; round 0 is the state before training. A value that was not
    recorded is missing (NaN or None).

    Args:
        path: the run directory.

    Raises:
        RunDirectoryError: there is no run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._paths = RunPaths(root=self.path.resolve())
        if not self._paths.run.exists():
            raise RunDirectoryError(
                f"{self.path}: no run here (no run.json); give the directory of a run"
            )

    def __repr__(self) -> str:
        """Return the path and how far the run is."""
        rounds = counted(self.config.rounds, "round")
        return f"LoadedRun({str(self.path)!r}, {self.rounds_done} of {rounds})"

    @cached_property
    def config(self) -> Config:
        """The resolved configuration."""
        return read_config(self._paths.config)

    @property
    def rounds_done(self) -> int:
        """How many rounds are finished; round 0 does not count."""
        return sum(
            each.number > 0 for each in run_rows.rounds_of(self._paths) if each.record.exists()
        )

    @cached_property
    def rounds(self) -> "pd.DataFrame":
        """The metrics of every finished round, with the columns of `metrics.jsonl`."""
        return _frame(metric_rows(self._paths))

    @cached_property
    def clients(self) -> "pd.DataFrame":
        """Training and test scores of every client and round.

        Columns with the prefix `test_` are scores as deployed (and `..._at_largest_rank`); the
        others are of the client's training in that round, and missing if it did not take part.
        """
        return _frame(run_rows.client_rows(self._paths))

    @cached_property
    def groups(self) -> "pd.DataFrame":
        """Mean test scores per round and group of clients (train, dev, unseen)."""
        return _frame(run_rows.group_rows(self._paths))

    @cached_property
    def tiers(self) -> "pd.DataFrame":
        """Mean test scores per round, group and tier."""
        return _frame(run_rows.tier_rows(self._paths))

    @cached_property
    def categories(self) -> "pd.DataFrame":
        """Mean test scores per round, group and category of the clients."""
        return _frame(run_rows.category_rows(self._paths))

    @cached_property
    def kinds(self) -> "pd.DataFrame":
        """Mean test scores per round, group and kind of tasks, of the twelve categories held out.

        Columns as in `categories`; empty without such categories.
        """
        return _frame(run_rows.kind_rows(self._paths))

    @cached_property
    def modules(self) -> "pd.DataFrame":
        """Spectrum, energies and truncation error of every module's update, per round."""
        return _frame(run_rows.module_rows(self._paths))

    @cached_property
    def partitions(self) -> "pd.DataFrame":
        """Reach (P_j) and energy of every range of directions between two ranks, per module."""
        return _frame(run_rows.partition_rows(self._paths))

    @cached_property
    def tasks(self) -> "pd.DataFrame":
        """Tasks: when they were submitted, started and ended, in seconds since the epoch."""
        return _frame(run_rows.task_rows(self._paths))

    @cached_property
    def answers(self) -> "pd.DataFrame":
        """Generated answers of a few test rows of every client (`evaluation.keep_answers`)."""
        return _frame(run_rows.answer_rows(self._paths))


def load_run(path: str | Path) -> LoadedRun:
    """Read a run directory.

    >>> import fedllm
    >>> run = fedllm.load_run("runs/quickstart")  # doctest: +SKIP
    >>> run.clients.groupby("tier").peak_memory_bytes.max()  # doctest: +SKIP

    Raises:
        RunDirectoryError: there is no run.
    """
    return LoadedRun(path)


def _frame(rows: Sequence[dict[str, Any]]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(list(rows))
