"""Sweeps as data frames: those of their runs, one below the other."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.api.loaded_run import LoadedRun
from fedllm.config.loading import validate
from fedllm.errors import RunDirectoryError, counted
from fedllm.storage.paths import SweepPaths
from fedllm.storage.sweep_records import SweepRecord

if TYPE_CHECKING:
    import pandas as pd


class LoadedSweep:
    """A sweep's folder: its runs by arm and seed, and their frames with columns `arm` and `seed`.

    Runs that have not begun are missing; tuning runs are no part of it.

    Args:
        path: the folder.

    Raises:
        RunDirectoryError: there is no sweep.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        paths = SweepPaths(root=self.path.resolve())
        record = SweepRecord.find(paths.record)
        if record is None:
            raise RunDirectoryError(
                f"{self.path}: no sweep here (no sweep.json); give the folder of a sweep"
            )
        self.runs: dict[tuple[str, int], LoadedRun] = {
            (run.arm, validate(run.config).seed): LoadedRun(paths.run(run.name).root)
            for run in record.runs
            if run.phase == "run" and paths.run(run.name).run.exists()
        }

    def __repr__(self) -> str:
        """Return the path and how many runs have begun."""
        return f"LoadedSweep({str(self.path)!r}, {counted(len(self.runs), 'run')})"

    @cached_property
    def rounds(self) -> "pd.DataFrame":
        """The metrics of every finished round of every run."""
        return self._joined("rounds")

    @cached_property
    def clients(self) -> "pd.DataFrame":
        """Training and test scores of every client, round and run."""
        return self._joined("clients")

    @cached_property
    def groups(self) -> "pd.DataFrame":
        """Mean test scores per round and group of clients, of every run."""
        return self._joined("groups")

    @cached_property
    def categories(self) -> "pd.DataFrame":
        """Mean test scores per round, group and category, of every run."""
        return self._joined("categories")

    @cached_property
    def modules(self) -> "pd.DataFrame":
        """Spectrum and energies of every module's update, per round and run."""
        return self._joined("modules")

    def _joined(self, name: str) -> "pd.DataFrame":
        import pandas as pd

        frames: list[Any] = []
        for (arm, seed), run in self.runs.items():
            frame = getattr(run, name)
            if not frame.empty:
                frames.append(frame.assign(arm=arm, seed=seed))
        joined = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        first = [column for column in ("arm", "seed") if column in joined]
        return joined[[*first, *(column for column in joined if column not in first)]]


def load_sweep(path: str | Path) -> LoadedSweep:
    """Read the folder of a sweep.

    Raises:
        RunDirectoryError: there is no sweep.
    """
    return LoadedSweep(path)
