"""Findings about a cluster's settings; no Slurm is needed."""

from typing import Any

import pytest

from fedllm.config.models import SchedulerSection
from fedllm.doctor.cluster import Cluster, JobKind, job_kinds
from fedllm.doctor.cluster_findings import (
    cluster_findings,
    endings_findings,
    partition_findings,
)
from fedllm.doctor.findings import Finding
from fedllm.planning.engines import Engine

CONTROLLER = {
    "SLURM_VERSION": "23.11.4",
    "ClusterName": "big",
    "SlurmctldHost[0]": "head",
    "AccountingStorageType": "accounting_storage/none",
    "MinJobAge": "300 sec",
    "MaxArraySize": "1001",
    "MaxJobCount": "10000",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "bf_max_job_user=20,debug",
    "JobRequeue": "1",
    "PreemptType": "preempt/qos",
    "PreemptMode": "REQUEUE",
}
PARTITION = {"Default": "YES", "State": "UP", "MaxTime": "1-00:00:00", "PreemptMode": "REQUEUE"}


PLAIN = Engine(name="plain")


def found(
    *,
    controller: dict[str, str] | None = None,
    partition: dict[str, str] | None = None,
    **keys: Any,
) -> dict[str, Finding]:
    """Return the findings about a cluster of one partition, by check."""
    section = SchedulerSection(kind="slurm", **keys)
    cluster = Cluster(
        controller={**CONTROLLER, **(controller or {})},
        partitions={"main": {**PARTITION, **(partition or {})}, "other": {"State": "UP"}},
    )
    kinds = job_kinds(section, {"small": PLAIN, "large": PLAIN})
    every = [
        *cluster_findings(cluster, section),
        *partition_findings(cluster, kinds),
        *endings_findings(cluster, kinds),
    ]
    return {finding.check: finding for finding in every}


def test_a_usual_cluster_has_nothing_to_change() -> None:
    assert not {check: f for check, f in found().items() if f.level != "ok"}


def test_scheduler_parameters_that_delay_arrays_are_named() -> None:
    assert found()["scheduling"].found == "sched/backfill: bf_max_job_user=20"


def test_workers_of_equal_options_are_one_kind_and_the_coordinator_has_its_files_time() -> None:
    kinds = job_kinds(SchedulerSection(), {"small": PLAIN, "large": PLAIN})
    names = ["client small, large", "prepare", "aggregate", "evaluate", "coordinator"]
    assert [kind.name for kind in kinds] == names
    assert kinds[-1].flags["time"] == "1-00:00:00"


def test_a_key_is_the_key_that_set_the_value() -> None:
    section = SchedulerSection.model_validate({"sbatch": {"tiers": {"big": {"time": "2-0"}}}})
    kind = job_kinds(section, {"big": PLAIN})[0]
    assert kind.key("time") == "scheduler.sbatch.tiers.big.time"


@pytest.mark.parametrize(
    ("controller", "check", "words"),
    [
        ({"MinJobAge": "30 sec"}, "accounting", "scheduler.query_seconds: 60"),
        ({"MaxJobCount": "100"}, "arrays", "scheduler.max_parallel: 64"),
    ],
)
def test_a_tight_setting_names_the_key_to_change(
    controller: dict[str, str], check: str, words: str
) -> None:
    finding = found(controller=controller)[check]
    assert finding.level == "warn"
    assert words in finding.change


def test_a_cluster_without_arrays_cannot_be_used() -> None:
    assert found(controller={"MaxArraySize": "0"})["arrays"].level == "fail"


@pytest.mark.parametrize(
    ("partition", "level", "words"),
    [
        ({"PreemptMode": "CANCEL", "GraceTime": "30"}, "warn", "checkpoint_every_minutes"),
        ({"PreemptMode": "SUSPEND,GANG"}, "warn", "scheduler.hung_minutes"),
        ({"PreemptMode": "OFF"}, "ok", ""),
    ],
)
def test_the_effect_of_preemption_is_found_per_partition(
    partition: dict[str, str], level: str, words: str
) -> None:
    finding = found(partition=partition)["preemption in main"]
    assert finding.level == level
    assert words in finding.change


def test_a_partition_that_is_down_fails_with_the_key_that_names_it() -> None:
    sbatch = {"default": {"partition": "main"}}
    finding = found(partition={"State": "DRAIN"}, sbatch=sbatch)["partition main"]
    assert finding.level == "fail"
    assert "scheduler.sbatch.default.partition" in finding.change


def test_only_partitions_that_jobs_use_are_checked() -> None:
    sbatch = {"tiers": {"large": {"partition": "other"}}}
    assert {"partition main", "partition other"} <= set(found(sbatch=sbatch))
    assert "partition other" not in found()


def test_tasks_without_requeueing_or_a_warning_signal_are_a_warning() -> None:
    plain = found(controller={"JobRequeue": "0"})
    assert plain["requeueing"].level == "ok"
    sbatch = {"client": {"requeue": None, "signal": None}}
    odd = found(controller={"JobRequeue": "0"}, sbatch=sbatch)
    assert odd["requeueing"].level == "warn"
    assert odd["requeueing"].change == "scheduler.sbatch.client.requeue: true"
    assert odd["warning before the end"].level == "warn"


def test_a_kind_without_a_known_partition_uses_none() -> None:
    cluster = Cluster(controller=CONTROLLER, partitions={"main": PARTITION})
    kind = JobKind(
        name="x", program="client", flags={"partition": "no"}, section=SchedulerSection()
    )
    assert cluster.partitions_of(kind) == []
