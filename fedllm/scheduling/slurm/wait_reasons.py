"""Slurm's reasons why a job waits, each with advice in one clause.

https://slurm.schedmd.com/job_reason_codes.html
"""

import re

_EXACT = {
    "Priority": "jobs of higher priority come first; shorter time limits let it start in gaps",
    "Resources": "it is next, once what it asks for is free; ask for less, or wait",
    "JobArrayTaskLimit": "as many tasks run as scheduler.max_parallel allows; raise it",
    "Dependency": "it starts once the jobs before it have ended",
    "DependencyNeverSatisfied": "the job before it failed; `fedllm cancel` and `fedllm resume`",
    "BeginTime": "it starts at a set time, soon after a requeue",
    "Licenses": "all licenses are in use; take `licenses` out of scheduler.sbatch if not needed",
    "Reservation": "its reservation has not begun; see `scontrol show reservation`",
    "ReservationDeleted": "its reservation is gone; change `reservation` in scheduler.sbatch",
    "PartitionDown": "the partition takes no jobs now; name another in scheduler.sbatch",
    "PartitionInactive": "the partition is off; name another in scheduler.sbatch",
    "PartitionTimeLimit": "the partition allows less time; lower `time` in scheduler.sbatch",
    "PartitionNodeLimit": "the partition allows fewer nodes; lower `nodes` in scheduler.sbatch",
    "PartitionConfig": "the partition cannot run such jobs; change scheduler.sbatch",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved; see `sinfo -R`",
    "NodeDown": "a node that it needs is down; see `sinfo -R`",
    "NodesDown": "nodes that it needs are down; see `sinfo -R`",
    "BadConstraints": "no node can satisfy it; change `constraint` and sizes in scheduler.sbatch",
    "JobHeldAdmin": "held by an admin; ask them",
    "JobHeldUser": "held by its user; `scontrol release` lets it start",
    "job requeued in held state": "requeued and held by its user or an admin; `scontrol release`",
    "JobHoldMaxRequeue": "it was requeued too often; `scontrol release` lets it start",
    "launch failed requeued held": "it could not be launched; `scontrol release`, see the node",
    "InvalidAccount": "the account may not be used any more; change `account` in scheduler.sbatch",
    "InvalidQOS": "the QOS may not be used any more; change `qos` in scheduler.sbatch",
    "QOSNotAllowed": "the partition does not take this QOS; change `qos` in scheduler.sbatch",
    "AccountNotAllowed": "the partition does not take this account; change scheduler.sbatch",
    "MaxMemPerLimit": "it asks for more memory than jobs may have; lower `mem` in scheduler.sbatch",
    "Prolog": "its node prepares itself",
    "Cleaning": "its last start is being cleaned up",
    "None": "Slurm has not looked at it yet",
}

# `QOSMaxGRESPerUser`, `AssocGrpCPURunMinutesLimit`, `QOSMaxJobsPerUserLimit`
_LIMIT = re.compile(
    r"(Assoc|QOS)(Max|Grp|Min)(\w+?)((?:Run)?Minutes)?(?:Per(\w+?))?(?:Limit|NotSatisfied)?"
)
_HOLDER = {"Assoc": "account", "QOS": "QOS"}
_WHAT = {
    "submitjob": "jobs in the queue",
    "submitjobs": "jobs in the queue",
    "cpu": "CPUs",
    "mem": "memory",
    "memory": "memory",
    "gres": "GPUs",
    "node": "nodes",
    "wall": "wall",
    "wallduration": "time",
    "bb": "burst buffer",
    "license": "licenses",
    "billing": "billed units",
}


def advice(reason: str) -> str:
    """Return advice for a job that waits for `reason`; empty: there is none.

    Slurm adds details behind a comma or in parentheses (`ReqNodeNotAvail, UnavailableNodes:n1`).
    """
    name = re.split(r"[,(:]", reason, maxsplit=1)[0].strip()
    match = _LIMIT.fullmatch(name)
    return _of_limit(*match.groups()) if match else _EXACT.get(name, "")


def _of_limit(holder: str, sort: str, what: str, used: str | None, per: str | None) -> str:
    """Return advice for a limit of an association or QOS."""
    its = _HOLDER[holder]
    named = _WHAT.get(what.lower(), what.lower())
    if sort == "Min":
        return f"the {its} wants jobs of more {named}; ask for more, or change it"
    if per in {"Job", "Node"}:
        return f"the {its} allows a job less {named}; ask for less in scheduler.sbatch"
    if used == "Minutes" or what == "Wall":
        return f"the {its} has used up its {named} time; use another, or ask an admin"
    whose = f"your jobs in this {its}" if sort == "Max" else f"all jobs of the {its}"
    if what == "Jobs":
        return f"as many of {whose} run as may; it starts as others end"
    return f"{whose} use all the {named} that they may; it starts as others end"
