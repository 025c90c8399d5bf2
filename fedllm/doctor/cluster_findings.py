"""Findings about a cluster's settings: what they mean for a run, and which key to change."""

from collections.abc import Iterator, Sequence

from fedllm.config.models import SchedulerSection
from fedllm.doctor.cluster import Cluster, JobKind, Settings
from fedllm.doctor.findings import Finding
from fedllm.scheduling.slurm.free_capacity import Surveyor
from fedllm.scheduling.slurm.limits import Allowed
from fedllm.scheduling.slurm.notation import version

# the SchedulerParameters that decide how soon and how many array tasks start
_START_PARAMETERS = (
    *("batch_sched_delay", "sched_min_interval", "default_queue_depth", "max_array_tasks"),
    *("bf_interval", "bf_max_job_user", "bf_max_job_array_resv", "max_rpc_cnt"),
)


def cluster_findings(cluster: Cluster, section: SchedulerSection) -> Iterator[Finding]:
    """Yield findings about settings that hold for all jobs."""
    controller = cluster.controller
    host = controller.get("SlurmctldHost[0]", "unknown")
    name = controller.get("ClusterName", "unknown")
    yield _ok("slurm", f"Slurm {version(controller)}, cluster {name}, controller {host}")
    yield _accounting(cluster, section)
    yield _arrays(controller, section)
    options = [
        o for o in controller.get("SchedulerParameters", "").split(",") if _decides_starts(o)
    ]
    parameters = ", ".join(options) or "Slurm's defaults (array tasks start in steps of seconds)"
    yield _ok("scheduling", f"{controller.get('SchedulerType', 'unknown')}: {parameters}")
    over, kill = controller.get("OverTimeLimit", "0"), controller.get("KillWait", "unknown")
    yield _ok("at the time limit", f"killed {kill} after SIGTERM; grace over the limit {over}")


def _accounting(cluster: Cluster, section: SchedulerSection) -> Finding:
    check, age = "accounting", cluster.controller.get("MinJobAge", "unknown")
    if cluster.accounting_problem:
        return Finding(
            check=check,
            level="warn",
            found=f"{cluster.accounting} does not answer ({cluster.accounting_problem})",
            change="nothing in the configuration: limits of associations are unknown until it does",
        )
    if cluster.accounting:
        return _ok(check, f"{cluster.accounting}; the controller forgets ended jobs after {age}")
    found = f"none: how a task ended is known for {age}"
    seconds = float(age.split()[0]) if age[:1].isdigit() else 0.0
    if seconds < 2 * section.query_seconds:
        change = f"scheduler.query_seconds: {section.query_seconds:g} is too slow; need less than "
        change += f"{seconds / 2:g}, or only records show how tasks ended"
        return Finding(check=check, level="warn", found=found, change=change)
    return _ok(check, found)


def _arrays(controller: Settings, section: SchedulerSection) -> Finding:
    size, jobs = controller.get("MaxArraySize", "1001"), controller.get("MaxJobCount", "10000")
    if size == "0":
        return Finding(
            check="arrays",
            level="fail",
            found="MaxArraySize 0: the cluster takes no arrays",
            change="ask the admins for MaxArraySize, or use scheduler.kind local in one job",
        )
    sizes = f"MaxArraySize {size} (more tasks become several arrays), MaxJobCount {jobs}"
    if int(jobs) < 2 * section.max_parallel:
        change = f"scheduler.max_parallel: {section.max_parallel} is much of what all users share"
        return Finding(check="arrays", level="warn", found=sizes, change=change)
    return _ok("arrays", sizes)


def limit_findings(
    cluster: Cluster, kinds: Sequence[JobKind], surveyor: Surveyor
) -> Iterator[Finding]:
    """Yield findings about this user's limits, one for each place that jobs count for."""
    check = "limits of this user"
    if not cluster.accounting or cluster.accounting_problem:
        why = cluster.accounting_problem or "there is no accounting, so there are none"
        yield Finding(check=check, level="not done", found=why)
        return
    surveys = {survey.place: survey for survey in (surveyor.survey(k.flags) for k in kinds)}
    for place, survey in surveys.items():
        if survey.accounting is None:
            enforced = cluster.controller.get("AccountingStorageEnforce", "none")
            yield _ok(check, f"none apply (AccountingStorageEnforce {enforced})")
            return
        names = {"account": place.account, "QOS": place.qos, "partition": place.partition}
        where = ", ".join(f"{kind} {name}" for kind, name in names.items() if name)
        yield _ok(f"limits of {where or 'this user'}", _describe_limits(survey.allowed))


def _describe_limits(allowed: Allowed) -> str:
    queued = min((bound.max_tasks for bound in allowed.queued), default=None)
    limits = {
        "queued": queued,
        "running": allowed.max_running,
        "minutes": allowed.max_minutes,
        **allowed.max_tres,
    }
    parts = [f"{name} {value:g}" for name, value in limits.items() if value is not None]
    return f"at most: {', '.join(parts)}; more goes in waves" if parts else "none"


def partition_findings(cluster: Cluster, kinds: Sequence[JobKind]) -> Iterator[Finding]:
    """Yield findings about the partitions that these kinds of jobs use, each once."""
    users: dict[str, list[JobKind]] = {}
    for kind in kinds:
        for name in cluster.partitions_of(kind):
            users.setdefault(name, []).append(kind)
    for name, using in users.items():
        partition = cluster.partitions[name]
        yield _state(name, partition, using)
        yield _preemption(name, partition, cluster.controller)


def _state(name: str, partition: Settings, using: Sequence[JobKind]) -> Finding:
    check = f"partition {name}"
    state = partition.get("State", "unknown")
    if state != "UP":
        keys = ", ".join(dict.fromkeys(kind.key("partition") for kind in using))
        change = f"choose another in {keys}, or wait"
        return Finding(check=check, level="fail", found=f"its state is {state}", change=change)
    limit, default = partition.get("MaxTime", "?"), partition.get("DefaultTime", "?")
    nodes = partition.get("TotalNodes", "?")
    return _ok(check, f"up, {nodes} nodes, longest time {limit}, default time {default}")


def _preemption(name: str, partition: Settings, controller: Settings) -> Finding:
    check = f"preemption in {name}"
    kind = controller.get("PreemptType", "").rpartition("/")[2]
    modes = partition.get("PreemptMode") or controller.get("PreemptMode", "OFF")
    grace = f"grace {partition.get('GraceTime', '0')} s"
    if kind == "none" or modes.startswith("OFF"):
        return _ok(check, "none: tasks of this partition are not preempted")
    found = f"{modes} by {kind}, {grace}"
    if "SUSPEND" in modes or "GANG" in modes:
        change = "scheduler.hung_minutes: longer than a suspension may last, or such tasks are lost"
        return Finding(check=check, level="warn", found=found, change=change)
    if "CANCEL" in modes:
        found += ": preempted tasks are not requeued, the next attempt goes on from checkpoints"
        change = "training.checkpoint_every_minutes bounds what is lost"
        return Finding(check=check, level="warn", found=found, change=change)
    return _ok(check, f"{found}: preempted tasks are requeued and go on from their checkpoints")


def endings_findings(cluster: Cluster, kinds: Sequence[JobKind]) -> Iterator[Finding]:
    """Yield findings about the warning before jobs end, and about requeueing."""
    without_requeue = [kind for kind in kinds if not _requeues(cluster, kind)]
    if without_requeue:
        keys = ", ".join(dict.fromkeys(kind.key("requeue") for kind in without_requeue))
        yield Finding(
            check="requeueing",
            level="warn",
            found="preempted tasks and those of lost nodes come back by the next attempt only "
            f"(JobRequeue={cluster.controller.get('JobRequeue', '?')})",
            change=f"{keys}: true",
        )
    else:
        yield _ok("requeueing", "tasks ask for it (--requeue), whatever JobRequeue says")
    silent = [kind for kind in kinds if kind.program == "client" and "signal" not in kind.flags]
    if silent:
        keys = ", ".join(dict.fromkeys(kind.key("signal") for kind in silent))
        yield Finding(
            check="warning before the end",
            level="warn",
            found="no signal comes before the time limit",
            change=f"{keys}: USR2@90, or lower training.checkpoint_every_minutes",
        )
    else:
        signals = {str(k.flags["signal"]) for k in kinds if k.program == "client"}
        yield _ok("warning before the end", f"--signal={', '.join(sorted(signals))}")


def _requeues(cluster: Cluster, kind: JobKind) -> bool:
    if kind.flags.get("requeue") or kind.flags.get("no-requeue"):
        return not kind.flags.get("no-requeue")
    return cluster.controller.get("JobRequeue") == "1"


def _decides_starts(option: str) -> bool:
    return option.partition("=")[0] in _START_PARAMETERS


def _ok(check: str, found: str) -> Finding:
    return Finding(check=check, level="ok", found=found)
