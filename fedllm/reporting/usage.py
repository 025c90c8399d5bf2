"""Machine time that a round used, from the progress records of its workers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.planning.option_spelling import by_flag
from fedllm.storage.paths import RoundPaths
from fedllm.storage.record_cache import RecordCache
from fedllm.storage.records import ArrayRecord, SubmissionRecord, TaskRecord, WorkersRecord

Options = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Machine time: tasks that worked, and their seconds in training, allocated, and times GPUs."""

    tasks: int = 0
    busy_seconds: float = 0.0
    allocated_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        """Return the sum of two usages."""
        return Usage(
            tasks=self.tasks + other.tasks,
            busy_seconds=self.busy_seconds + other.busy_seconds,
            allocated_seconds=self.allocated_seconds + other.allocated_seconds,
            gpu_seconds=self.gpu_seconds + other.gpu_seconds,
        )

    @property
    def efficiency(self) -> float | None:
        """Busy over allocated time; None where nothing was allocated."""
        return self.busy_seconds / self.allocated_seconds if self.allocated_seconds else None


def round_usage(paths: RoundPaths, records: RecordCache | None = None) -> Usage:
    """Return what the tasks of a round's attempts have used so far.

    A killed task counts up to its last progress record, at most a minute before its end.

    Args:
        paths: the round.
        records: the cache of a caller that asks repeatedly.
    """
    records = records or RecordCache()
    total = Usage()
    number = 1
    while plan := records.find(SubmissionRecord, (attempt := paths.attempt(number)).submission):
        gpus = gpus_of_classes(plan)
        for record in records.all(TaskRecord, attempt.task_files()):
            total += task_usage(record, gpus.get(record.worker_class, 0))
        number += 1
    return total


def task_usage(record: TaskRecord, gpus: int) -> Usage:
    """Return what one task used in all its starts, with `gpus` GPUs."""
    allocated = record.allocated_seconds + record.earlier_allocated_seconds
    return Usage(
        tasks=1,
        busy_seconds=record.busy_seconds + record.earlier_busy_seconds,
        allocated_seconds=allocated,
        gpu_seconds=gpus * allocated,
    )


def gpus_of_classes(plan: SubmissionRecord) -> dict[str, int]:
    """Return the GPUs of a task per class of a plan."""
    planned: dict[str, WorkersRecord | ArrayRecord] = dict(plan.workers)
    planned |= {array.worker_class: array for array in plan.arrays}
    return {
        name: gpus_of(of_task(part.options, part.processes, part.nodes))
        for name, part in planned.items()
    }


def of_task(options: Options, processes: int, nodes: int) -> Options:
    """Return the sbatch options of a task with the number of its processes and nodes."""
    return {**options, "ntasks": processes, "nodes": nodes} if processes > 1 else options


def gpus_of(options: Options) -> int:
    """Return the number of GPUs of a task with these sbatch options."""
    flags = by_flag(options)
    nodes, processes = _count(flags.get("nodes")), _count(flags.get("ntasks"))
    for name, times in (("gpus", 1), ("gpus-per-node", nodes), ("gpus-per-task", processes)):
        if flags.get(name):
            return times * sum(_count(part) for part in str(flags[name]).split(","))
    parts = [part for part in str(flags.get("gres") or "").split(",") if _is_gpu(part)]
    return nodes * sum(_count(part) for part in parts)


def cpus_of(options: Options) -> int:
    """Return the number of CPUs that these sbatch options request for a task."""
    flags = by_flag(options)
    nodes = _count(flags.get("nodes"))
    processes = flags.get("ntasks") or nodes * _count(flags.get("ntasks-per-node"))
    return _count(processes) * _count(flags.get("cpus-per-task"))


def memory_of(options: Options) -> str:
    """Return the memory that these sbatch options request, as written there."""
    flags = by_flag(options)
    if flags.get("mem"):
        return str(flags["mem"])
    shares = [
        f"{flags[f'mem-per-{unit}']} per {unit.upper()}"
        for unit in ("cpu", "gpu")
        if flags.get(f"mem-per-{unit}")
    ]
    return shares[0] if shares else ""


def _is_gpu(resource: str) -> bool:
    return resource.strip().split(":")[0].removeprefix("gres/") == "gpu"


def _count(value: str | int | float | bool | None) -> int:
    """Return the number in `4`, `2-8` (at least two), `a100:4` or `gpu:a100:4`, else 1."""
    match = re.match(r"(\d+)", str(value).rpartition(":")[2].partition("(")[0].strip())
    return int(match[1]) if match else 1
