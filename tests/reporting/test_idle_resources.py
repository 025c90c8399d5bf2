"""A plan warns of resources that nothing uses, and of jobs slower than they need be."""

from typing import Any

import pytest

from fedllm.reporting.plan.idle_resources import resource_warnings
from tests.planning.federations import config_of

GPU = {"gpus": 1, "cpus-per-task": 4}


def warnings(training: dict[str, object] | None = None, **sbatch: object) -> list[str]:
    changes = {f"training__{key}": value for key, value in (training or {}).items()}
    return resource_warnings(config_of(scheduler__sbatch=sbatch, **changes))


def test_jobs_with_what_they_use_are_not_warned_of() -> None:
    assert warnings() == []
    assert warnings(client=GPU, aggregate=GPU, evaluate=GPU) == []
    assert warnings(training={"threads": 4}, default={"cpus-per-task": 4}) == [
        "scheduler.sbatch.aggregate.cpus-per-task: 4 are charged, but aggregation.threads is 1; "
        "ask for 1, or set aggregation.threads: 4"
    ]


def test_gpus_and_cpus_that_nothing_uses_are_named() -> None:
    two = {"gpus": 2, "cpus-per-task": 4}
    (gpus,) = warnings(client=two, aggregate=GPU, evaluate=GPU)
    assert gpus == ("scheduler.sbatch.client: 2 GPUs are charged, but the task uses 1; ask for 1")
    (cpus,) = warnings(client={"cpus-per-task": 4})
    assert cpus.startswith("scheduler.sbatch.client.cpus-per-task: 4 are charged, but")
    assert cpus.endswith("training.threads is 1; ask for 1, or set training.threads: 4")


def test_a_thread_without_a_cpu_is_named() -> None:
    lines = warnings(training={"threads": 8}, client={"cpus-per-task": 2})
    assert any("training.threads is 8, but a process has 2" in line for line in lines)


@pytest.mark.parametrize("kind", ["aggregate", "evaluate"])
def test_a_job_on_a_cpu_while_clients_have_a_gpu_is_named(kind: str) -> None:
    other = {"aggregate": "evaluate", "evaluate": "aggregate"}[kind]
    given: dict[str, Any] = {other: GPU}
    (line,) = warnings(client=GPU, **given)
    assert line.startswith(f"scheduler.sbatch.{kind}: clients train on a GPU, but this job has")
