"""Advice for a job that waits."""

import re

import pytest

from fedllm.scheduling.slurm.wait_reasons import advice

# the reasons of Slurm 22.05 that name a limit, from its library
LIMITS = re.findall(
    r"\w+",
    """
    AssocGrpBB AssocGrpBBMinutes AssocGrpBilling AssocGrpCPUMinutesLimit
    AssocGrpCPURunMinutesLimit AssocGrpCpuLimit AssocGrpGRES AssocGrpGRESMinutes
    AssocGrpGRESRunMinutes AssocGrpJobsLimit AssocGrpMemLimit AssocGrpNodeLimit
    AssocGrpSubmitJobsLimit AssocGrpUnknown AssocGrpWallLimit AssocMaxCpuMinutesPerJobLimit
    AssocMaxCpuPerJobLimit AssocMaxCpuPerNode AssocMaxGRESPerJob AssocMaxGRESPerNode
    AssocMaxJobsLimit AssocMaxMemPerJob AssocMaxNodePerJobLimit AssocMaxSubmitJobLimit
    AssocMaxWallDurationPerJobLimit QOSGrpCPUMinutesLimit QOSGrpCpuLimit QOSGrpGRES
    QOSGrpJobsLimit QOSGrpLicense QOSGrpMemLimit QOSGrpMemoryMinutes QOSGrpNodeLimit
    QOSGrpSubmitJobsLimit QOSGrpWallLimit QOSMaxCpuMinutesPerJobLimit QOSMaxCpuPerJobLimit
    QOSMaxCpuPerNode QOSMaxCpuPerUserLimit QOSMaxGRESPerJob QOSMaxGRESPerUser
    QOSMaxJobsPerUserLimit QOSMaxMemoryPerJob QOSMaxMemoryPerUser QOSMaxNodePerUserLimit
    QOSMaxSubmitJobPerUserLimit QOSMaxWallDurationPerJobLimit QOSMinCpuNotSatisfied
    QOSMinGRES QOSMinMemory QOSMinNode
    """,
)


@pytest.mark.parametrize("reason", LIMITS)
def test_every_limit_is_explained_by_whose_it_is(reason: str) -> None:
    assert ("QOS" if reason.startswith("QOS") else "account") in advice(reason)


@pytest.mark.parametrize(
    ("reason", "helps"),
    [
        ("JobArrayTaskLimit", "scheduler.max_parallel"),
        ("Priority", "shorter time limits"),
        ("PartitionTimeLimit", "lower `time`"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "sinfo -R"),
        ("ReqNodeNotAvail, May be reserved for other job", "sinfo -R"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority", ""),
        ("JobHeldUser", "scontrol release"),
        ("launch failed requeued held", "scontrol release"),
        ("QOSMaxJobsPerUserLimit", "as many of your jobs in this QOS run as may"),
        ("AssocGrpCPUMinutesLimit", "the account has used up its CPUs time"),
        ("AssocGrpGRES", "all jobs of the account use all the GPUs"),
        ("QOSMaxWallDurationPerJobLimit", "allows a job less time"),
        ("QOSMinCpuNotSatisfied", "wants jobs of more CPUs"),
        ("SomethingNew", ""),
    ],
)
def test_a_reason_is_answered_with_what_would_help(reason: str, helps: str) -> None:
    said = advice(reason)
    assert helps in said
    assert bool(said) == bool(helps)
