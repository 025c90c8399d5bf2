"""A cluster's limits as they are read, and what is refused because of them; a real Slurm."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.models import SchedulerSection
from fedllm.errors import ConfigError
from fedllm.planning.capacity import Capacity
from fedllm.scheduling.seam import Job, SchedulerFull
from fedllm.scheduling.slurm.executor import SlurmScheduler
from tests.cli.commands import in_process, one_line
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import ON_CLUSTER, settings
from tests.tiny import Tiny

pytestmark = [pytest.mark.slurm, pytest.mark.parametrize("cluster", ["limited"], indirect=True)]


@pytest.fixture
def scheduler(cluster: Cluster) -> SlurmScheduler:  # noqa: ARG001
    return SlurmScheduler(section=SchedulerSection(query_seconds=0.2, max_parallel=64))


@pytest.fixture
def held(tmp_path: Path) -> Callable[..., Job]:
    """Jobs that wait until somebody releases them."""

    def make(tasks: int, **options: Any) -> Job:
        given = {"hold": True, **options}
        return Job(
            name="held", program="client", argv=(), tasks=tasks, log_folder=tmp_path, options=given
        )

    return make


def known(cluster: Cluster) -> set[str]:
    """Return the jobs that Slurm knows of, ended ones too."""
    return set(cluster.slurm("squeue", "-h", "-t", "all", "-o", "%F").split())


def test_room_is_what_the_limits_of_cluster_partition_and_association_leave(
    scheduler: SlurmScheduler, held: Callable[..., Job]
) -> None:
    # 2 nodes of 4 CPUs and 2 GPUs; MaxSubmitJobs 5, one place is kept
    assert scheduler.capacity({"mem": 100}) == Capacity(
        free_slots=8, max_parallel=64, largest_array=10, free_tasks=4
    )
    assert scheduler.capacity({"gpus": 1, "exclude": "n2"}).free_slots == 2
    assert scheduler.capacity({"partition": "short"}).max_minutes == 30
    scheduler.submit(held(3))
    assert scheduler.capacity({}).free_tasks == 1


def test_limits_of_a_qos_come_before_those_of_the_association(
    scheduler: SlurmScheduler, cluster: Cluster, held: Callable[..., Job]
) -> None:
    limits = ("MaxSubmitJobsPerUser=8", "MaxJobsPerUser=6", "MaxWall=2:00:00")
    cluster.slurm("sacctmgr", "-i", "add", "qos", "large", "set", *limits)
    cluster.slurm("sacctmgr", "-i", "modify", "account", "lab", "set", "qos+=large")
    large = {"qos": "large"}
    until(lambda: not _is_refused(scheduler, held(1, **large)))
    found = scheduler.capacity(large)
    assert (found.free_tasks, found.max_parallel, found.max_minutes) == (7, 6, 120)
    # more than the association's 5
    scheduler.submit(held(7, **large))
    assert scheduler.capacity(large).free_tasks == 0
    with pytest.raises(SchedulerFull, match="QOSMaxSubmitJobPerUserLimit"):
        scheduler.submit(held(2, **large))


def _is_refused(scheduler: SlurmScheduler, job: Job) -> bool:
    try:
        scheduler.check([job])
    except ConfigError:
        return True
    return False


def test_a_full_queue_is_told_as_such_and_has_room_again_later(
    scheduler: SlurmScheduler, cluster: Cluster, held: Callable[..., Job]
) -> None:
    ids = scheduler.submit(held(4))
    with pytest.raises(SchedulerFull, match="AssocMaxSubmitJobLimit"):
        scheduler.submit(held(2))
    # the one that was kept
    ids += scheduler.submit(held(1))
    assert scheduler.capacity({}).free_tasks == 0
    scheduler.cancel(ids)
    until(lambda: scheduler.capacity({}).free_tasks == 4)
    assert len(scheduler.submit(held(2))) == 2
    del cluster


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ("scheduler.sbatch.client.partition=nope",),
            "scheduler.sbatch.client.partition: nope: refused by sbatch (invalid partition "
            "specified: nope; allocation failure: Invalid partition name specified); change it; "
            "partitions here: high, low, short",
        ),
        (
            ("scheduler.sbatch.default.partition=short", "scheduler.sbatch.default.time=31"),
            "scheduler.sbatch.default.time: 31: partition short allows 30 minutes; ask for no more",
        ),
        (
            ("scheduler.sbatch.evaluate.partition=short",),
            "scheduler.sbatch.evaluate.time: 60: partition short allows 30 minutes; "
            "ask for no more",
        ),
        (
            ("scheduler.sbatch.default.account=denied",),
            "scheduler.sbatch.default.account: denied: refused by sbatch (allocation failure: "
            "Invalid account or account/partition combination specified); change it; "
            "accounts that you may use: lab, root",
        ),
    ],
)
def test_what_slurm_would_refuse_or_never_start_is_one_line_and_nothing_is_submitted(
    changes: tuple[str, ...], told: str, tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    before = known(cluster)
    root = tmp_path / "run"
    done = in_process("run", tiny.config, "--run-dir", root, *settings(*ON_CLUSTER, *changes))
    if os.geteuid():
        # who is not root has no association with account `root`
        told = told.replace("lab, root", "lab")
    assert one_line(done).removeprefix("fedllm: ") == told
    assert known(cluster) == before
    assert not root.exists()


def test_a_coordinator_that_would_wait_for_ever_is_not_submitted(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    before = known(cluster)
    root = tmp_path / "run"
    changes = settings(*ON_CLUSTER, "scheduler.sbatch.coordinator.partition=short")
    done = in_process("submit", tiny.config, "--run-dir", root, *changes)
    assert one_line(done).removeprefix("fedllm: ") == (
        "scheduler.sbatch.coordinator.time: 1-00:00:00: partition short allows 30 minutes; "
        "ask for no more"
    )
    assert known(cluster) == before
    assert not root.exists()


def test_all_that_would_be_refused_is_told_together(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    before = known(cluster)
    changes = (
        "scheduler.sbatch.prepare.mem=900G",
        "scheduler.sbatch.client.constraint=fast",
        "scheduler.sbatch.aggregate.qos=nope",
    )
    root = tmp_path / "run"
    done = in_process("run", tiny.config, "--run-dir", root, *settings(*ON_CLUSTER, *changes))
    assert done.returncode == 2
    keys = [line.removeprefix("fedllm: ").partition(":")[0] for line in done.stderr.splitlines()]
    assert keys == [
        "scheduler.sbatch.prepare.mem",
        "scheduler.sbatch.aggregate.qos",
        "scheduler.sbatch.client.constraint",
    ]
    assert known(cluster) == before


def test_a_coordinator_whose_jobs_would_be_refused_is_not_submitted_either(
    tiny: Tiny, cluster: Cluster, tmp_path: Path
) -> None:
    before = known(cluster)
    words = settings(*ON_CLUSTER, "scheduler.sbatch.client.partition=nope")
    done = in_process("submit", tiny.config, "--run-dir", tmp_path / "run", *words)
    assert one_line(done).startswith("fedllm: scheduler.sbatch.client.partition: nope: refused by")
    assert known(cluster) == before
