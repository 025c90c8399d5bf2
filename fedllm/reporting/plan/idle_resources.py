"""Resources that a configuration asks for and nothing uses, and jobs slower than they need be."""

from collections.abc import Iterator
from dataclasses import dataclass

from fedllm.config.models import Config
from fedllm.planning.classes import job_options, tier_options
from fedllm.planning.engines import engines_of, job_size
from fedllm.planning.option_spelling import by_flag
from fedllm.reporting.usage import Options, cpus_of, gpus_of, of_task

# beside a GPU a process also reads files, prepares batches and publishes updates
_CPUS_BESIDE_GPU = 4
_CPUS = "cpus-per-task"


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A task: the key of its options, its processes, and what each of them can use."""

    key: str
    options: Options
    processes: int
    threads: int
    threads_key: str
    gpus: int


def resource_warnings(config: Config) -> list[str]:
    """Return a line for each request that nothing uses, and for each job that lacks something.

    The rule: a job where clients have a GPU has one too, and every thread has a CPU.
    """
    clients = list(_clients(config))
    jobs = list(_jobs(config))
    lines = [line for task in [*clients, *jobs] for line in _unused(task)]
    if any(gpus_of(task.options) for task in clients):
        lines += [_without_gpu(task) for task in jobs if not gpus_of(task.options)]
    return list(dict.fromkeys(lines))


def _clients(config: Config) -> Iterator[_Task]:
    section = config.scheduler.sbatch
    for tier, engine in engines_of(config).items():
        yield _Task(
            key=f"sbatch.tiers.{tier}" if section.tiers.get(tier) else "sbatch.client",
            options=of_task(tier_options(section, tier), engine.processes, 1),
            processes=engine.processes,
            threads=config.training.threads,
            threads_key="training.threads",
            gpus=engine.processes,
        )


def _jobs(config: Config) -> Iterator[_Task]:
    section, engines = config.scheduler.sbatch, engines_of(config)
    scoring = job_size("evaluate", engines)
    yield _Task(
        key="sbatch.evaluate",
        options=of_task(job_options(section, "evaluate"), scoring.processes, 1),
        processes=scoring.processes,
        threads=config.training.threads,
        threads_key="training.threads",
        gpus=scoring.processes,
    )
    device = config.aggregation.device
    yield _Task(
        key="sbatch.aggregate",
        options=job_options(section, "aggregate"),
        processes=1,
        threads=config.aggregation.threads,
        threads_key="aggregation.threads",
        gpus=1 if isinstance(device, str) else len(device),
    )


def _unused(task: _Task) -> Iterator[str]:
    gpus, key = gpus_of(task.options), f"scheduler.{task.key}"
    if gpus > task.gpus:
        yield f"{key}: {gpus} GPUs are charged, but the task uses {task.gpus}; ask for {task.gpus}"
    if _CPUS not in by_flag(task.options):
        return
    cpus = cpus_of(task.options) // max(1, task.processes)
    usable = max(task.threads, _CPUS_BESIDE_GPU) if gpus else task.threads
    if cpus > usable:
        yield (
            f"{key}.{_CPUS}: {cpus} are charged, but {task.threads_key} is {task.threads}; ask "
            f"for {usable}, or set {task.threads_key}: {cpus}"
        )
    elif cpus < task.threads:
        yield (
            f"{key}.{_CPUS}: {task.threads_key} is {task.threads}, but a process has {cpus}: its "
            f"threads wait for each other; ask for {task.threads}"
        )


def _without_gpu(task: _Task) -> str:
    return (
        f"scheduler.{task.key}: clients train on a GPU, but this job has none and runs on a CPU; "
        f"add gpus: {task.gpus}, and the partition of sbatch.client"
    )
