"""Names of the logs of array tasks, and how many logs a folder may hold."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedllm.storage.paths import MAX_ENTRIES

# logs in one folder, beside the script of their array
MAX_LOGS = MAX_ENTRIES - 1


def need_folders(tasks: int) -> bool:
    """Say whether each array of an attempt with `tasks` tasks needs its own folder of logs."""
    return tasks > MAX_ENTRIES // 2


def log_of(folder: Path, task: str, *, process: int | str = 0) -> Path:
    """Return the log of a task's process; the task's batch script writes to that of process 0."""
    return folder / f"{task}_{process}_log.out"


def script_of(folder: Path, name: str) -> Path:
    """Return the script of an array, which lies beside the logs of its tasks."""
    return folder / f"{name}.sbatch"


def task_of(log: Path) -> str:
    """Return the task of a log: `1234_5_0_log.out` belongs to task `1234_5`."""
    return "_".join(log.name.split("_")[:2])


def has_log(folder: Path, task: str) -> bool:
    """Say whether a task has opened its log: Slurm opens it before the script runs."""
    return any(folder.glob(f"{task}_*"))


def files_of(folder: Path, name: str, tasks: Sequence[str]) -> Iterator[Path]:
    """Yield the logs and the script of an array of one-process tasks."""
    yield from (log_of(folder, task) for task in tasks)
    yield script_of(folder, name)
