"""How the logs of array tasks are named, and how many of them a folder takes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedllm.storage.paths import MOST_ENTRIES

# tasks whose logs lie in one folder, beside the script of their array
MAX_LOGS = MOST_ENTRIES - 1


def need_folders(tasks: int) -> bool:
    """Say whether arrays of so many tasks need a folder of logs each."""
    return tasks > MOST_ENTRIES // 2


def log_of(folder: Path, task: str, *, process: int | str = 0) -> Path:
    """Return the log of a task's process; what starts the task writes to that of the first."""
    return folder / f"{task}_{process}_log.out"


def script_of(folder: Path, name: str) -> Path:
    """Return the script of an array, which lies beside the logs of its tasks."""
    return folder / f"{name}.sbatch"


def task_of(log: Path) -> str:
    """Return the task that a log is of: `1234_5_0_log.out` is that of `1234_5`."""
    return "_".join(log.name.split("_")[:2])


def has_log(folder: Path, task: str) -> bool:
    """Say whether a task could open its log: that happens before the first line of it runs."""
    return any(folder.glob(f"{task}_*"))


def files_of(folder: Path, name: str, tasks: Sequence[str]) -> Iterator[Path]:
    """Yield what an array of one-process tasks leaves in its folder."""
    yield from (log_of(folder, task) for task in tasks)
    yield script_of(folder, name)
