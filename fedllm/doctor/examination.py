"""All checks of `fedllm doctor`, in their order."""

import uuid
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedllm.config.models import Config, SchedulerSection, StorageSection
from fedllm.doctor.cluster import JobKind, ask_cluster, job_kinds, refusals
from fedllm.doctor.cluster_findings import (
    cluster_findings,
    endings_findings,
    limit_findings,
    partition_findings,
)
from fedllm.doctor.findings import Finding, Level
from fedllm.doctor.host_findings import folder_findings, readiness_findings
from fedllm.doctor.node_findings import NodeRequirements, node_findings
from fedllm.doctor.node_probe import Probe, ProbeWaits, node_options
from fedllm.doctor.reach_probe import ReachProbe
from fedllm.doctor.trials import ProbeResult, installed_versions, nearest_folder, trial_folder
from fedllm.errors import FedllmError, RunDirectoryError, UserError
from fedllm.planning.classes import asks_for_gpus
from fedllm.planning.engines import Engine, engines_of
from fedllm.scheduling.slurm.commands import InstalledCommands
from fedllm.scheduling.slurm.free_capacity import Surveyor
from fedllm.scheduling.slurm.script import log_pattern
from fedllm.scheduling.traits import shared_cache, traits_of
from fedllm.storage.paths import RunPaths, shipped
from fedllm.storage.publishing.publish import make_folder
from fedllm.storage.trust.secret import secret_digest

# longer than a doctor runs, so that each query is sent to Slurm once
_ONCE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """A configuration to check, or none: then the cluster is checked with its own defaults."""

    scheduler: SchedulerSection
    storage: StorageSection
    root: Path
    config: Config | None
    wait_seconds: float

    @property
    def uses_cluster(self) -> bool:
        """Whether a batch system would run its jobs."""
        return self.config is None or traits_of(self.config).jobs_outlive_coordinator

    @property
    def kinds(self) -> list[JobKind]:
        """The kinds of jobs that it submits."""
        of_default = {"of default options": Engine(name="plain")}
        return job_kinds(self.scheduler, engines_of(self.config) if self.config else of_default)


def examine(request: DoctorRequest) -> Iterator[Finding]:
    """Yield the findings about configuration, cluster, compute nodes and folders."""
    if request.config is not None:
        yield from readiness_findings(request.config, request.root)
    if request.uses_cluster:
        yield from _on_cluster(request)
    else:
        why = f"scheduler.kind is {request.scheduler.kind}: no cluster is used"
        yield Finding(check="slurm", level="not done", found=why)
        yield from folder_findings(request.root, request.storage, on_cluster=False)


def _on_cluster(request: DoctorRequest) -> Iterator[Finding]:
    results: list[ProbeResult] = []
    try:
        log_pattern(RunPaths(root=request.root.resolve()).all_logs, "")
    except RunDirectoryError as error:
        yield Finding(check="run directory", level="fail", found=str(error))
    try:
        cluster = ask_cluster()
        kinds = request.kinds
    except FedllmError as error:
        change = "start from a host of the cluster, or use scheduler.kind: local"
        yield Finding(check="slurm", level="fail", found=str(error), change=change)
        yield Finding(check="compute nodes", level="not done", found="Slurm has to answer first")
    else:
        yield from cluster_findings(cluster, request.scheduler)
        yield from partition_findings(cluster, kinds)
        yield from endings_findings(cluster, kinds)
        surveyor = Surveyor(commands=InstalledCommands(), query_seconds=_ONCE_SECONDS)
        yield from limit_findings(cluster, kinds, surveyor)
        accepted = yield from _accepted(kinds, surveyor)
        yield from _on_nodes(request, accepted, results)
    hosts = {result.node.host for result in results if not result.node.storage_problem}
    yield from folder_findings(request.root, request.storage, on_cluster=True, seen_from=hosts)


def _accepted(
    kinds: Sequence[JobKind], surveyor: Surveyor
) -> Generator[Finding, None, list[JobKind]]:
    """Test jobs of every kind with sbatch; return the kinds that it would accept."""
    accepted = []
    for kind in kinds:
        check = f"sbatch --test-only, {kind.name}"
        level: Level = "fail"
        try:
            lines = refusals(kind, surveyor)
        except FedllmError as error:
            lines, level = [str(error)], "not done"
        yield from (Finding(check=check, level=level, found=line) for line in lines)
        if lines:
            why = "sbatch has to accept such jobs first"
            yield Finding(check=f"compute node for {kind.name}", level="not done", found=why)
        else:
            accepted.append(kind)
    if accepted:
        names = "jobs of every kind" if len(accepted) == len(kinds) else _names(accepted)
        found = f"{names} would be accepted"
        yield Finding(check="sbatch --test-only", level="ok", found=found)
    return accepted


def _names(kinds: Sequence[JobKind]) -> str:
    return ", ".join(kind.name for kind in kinds)


def _on_nodes(
    request: DoctorRequest, kinds: Sequence[JobKind], results: list[ProbeResult]
) -> Iterator[Finding]:
    """Run a probe on the nodes that jobs get, one probe for jobs of equal options."""
    groups: dict[object, list[JobKind]] = {}
    for kind in kinds:
        groups.setdefault(node_options(kind.flags), []).append(kind)
    if not groups:
        return
    parent = nearest_folder(request.root)
    try:
        with trial_folder(parent) as folder, ThreadPoolExecutor(len(groups)) as pool:
            names = [_names(group) for group in groups.values()]
            if len(groups) == 1 and len(kinds) == len(request.kinds):
                names = ["every kind of job"]
            for probed in pool.map(partial(_probed, request, folder), groups.values(), names):
                yield from probed.findings
                results += probed.results
            yield from _reach(request, kinds, folder)
    except RunDirectoryError as error:
        yield Finding(check="compute nodes", level="not done", found=str(error))


def _reach(request: DoctorRequest, kinds: Sequence[JobKind], folder: Path) -> Iterator[Finding]:
    """Let the processes of a task of every class that has several reach each other."""
    for kind in kinds:
        own = folder / uuid.uuid4().hex
        probe = ReachProbe(
            section=request.scheduler,
            flags=kind.flags,
            folder=own,
            wait_seconds=request.wait_seconds,
        )
        if probe.processes > 1:
            make_folder(own)
            yield from probe.findings(kind.name)


@dataclass(frozen=True, kw_only=True)
class _Probed:
    findings: list[Finding]
    results: list[ProbeResult]


def _probed(request: DoctorRequest, folder: Path, kinds: Sequence[JobKind], name: str) -> _Probed:
    """Probe the node that jobs of these kinds get; a probe that fails is a finding too."""
    own = folder / uuid.uuid4().hex
    make_folder(own)
    probe = Probe(
        section=request.scheduler,
        flags=kinds[0].flags,
        folder=own,
        also=tuple(_paths_for_jobs(request)),
        node_local=request.storage.node_local,
        visibility_seconds=request.storage.visibility_seconds,
        wait_seconds=request.wait_seconds,
    )
    check = f"compute node for {name}"
    try:
        result = probe.run()
    except ProbeWaits as error:
        change = "run it again when nodes are free, or wait longer: fedllm doctor --wait 3600"
        finding = Finding(check=check, level="not done", found=str(error), change=change)
        return _Probed(findings=[finding], results=[])
    except FedllmError as error:
        change = "scheduler.python, scheduler.setup: they start Python in a job"
        finding = Finding(check=check, level="fail", found=str(error), change=change)
        return _Probed(findings=[finding], results=[])
    flags = kinds[0].flags
    needs = NodeRequirements(
        key=f"scheduler.sbatch.{kinds[0].program}",
        cpus=int(flags.get("cpus-per-task", 1)),
        gpus=asks_for_gpus(dict(flags)),
        versions=dict(installed_versions()),
        visibility_seconds=request.storage.visibility_seconds,
        node_local=request.storage.node_local,
        submits=any(kind.program == "coordinator" for kind in kinds),
        secret=_secret_here(),
    )
    return _Probed(findings=node_findings(name, result, needs, folder.parent), results=[result])


def _secret_here() -> str:
    try:
        return secret_digest()
    except UserError:
        return ""


def _paths_for_jobs(request: DoctorRequest) -> Iterator[Path]:
    """Yield the paths that jobs read besides the run directory."""
    yield shipped("jobs")
    yield shared_cache(request.storage, request.scheduler, request.root).root
    if request.config is not None:
        for path in (request.config.model.path, request.config.data.path):
            yield Path(path).expanduser().absolute()
