"""All that `fedllm doctor` looks at, in its order."""

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
from fedllm.doctor.node_probe import Probe, ProbeWaits, node_options
from fedllm.doctor.report import NodeRequirements, node_findings
from fedllm.doctor.surroundings import folder_findings, readiness_findings
from fedllm.doctor.trials import ProbeResult, installed_versions, nearest_folder, trial_folder
from fedllm.errors import FedllmError, RunDirectoryError
from fedllm.planning.classes import asks_for_gpus
from fedllm.scheduling.slurm.commands import InstalledCommands
from fedllm.scheduling.slurm.free_capacity import Surveyor
from fedllm.scheduling.slurm.script import log_pattern
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import RunPaths, cache_of, shipped
from fedllm.storage.publishing.publish import make_folder

# a question to Slurm is asked once, whatever the number of kinds of jobs
_ONCE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """What is looked at: a configuration, or without one the cluster as it comes."""

    scheduler: SchedulerSection
    storage: StorageSection
    root: Path
    config: Config | None
    wait_seconds: float

    @property
    def uses_cluster(self) -> bool:
        """Whether its jobs would be a batch system's."""
        return self.config is None or traits_of(self.config).jobs_outlive_coordinator

    @property
    def kinds(self) -> list[JobKind]:
        """The jobs that it submits."""
        tiers = self.config.clients.tiers if self.config else {"of default options": None}
        return job_kinds(self.scheduler, tiers)


def examine(examinee: DoctorRequest) -> Iterator[Finding]:
    """Yield what is found: configuration, cluster, compute nodes, folders."""
    if examinee.config is not None:
        yield from readiness_findings(examinee.config, examinee.root)
    if examinee.uses_cluster:
        yield from _on_cluster(examinee)
    else:
        why = f"scheduler.kind is {examinee.scheduler.kind}: no cluster is used"
        yield Finding(check="slurm", level="not done", found=why)
        yield from folder_findings(examinee.root, examinee.storage, on_cluster=False)


def _on_cluster(examinee: DoctorRequest) -> Iterator[Finding]:
    sights: list[ProbeResult] = []
    try:
        log_pattern(RunPaths(root=examinee.root.resolve()).all_logs, "")
    except RunDirectoryError as error:
        yield Finding(check="run directory", level="fail", found=str(error))
    try:
        cluster = ask_cluster()
        kinds = examinee.kinds
    except FedllmError as error:
        change = "start from a host of the cluster, or use scheduler.kind: local"
        yield Finding(check="slurm", level="fail", found=str(error), change=change)
        yield Finding(check="compute nodes", level="not done", found="Slurm has to answer first")
    else:
        yield from cluster_findings(cluster, examinee.scheduler)
        yield from partition_findings(cluster, kinds)
        yield from endings_findings(cluster, kinds)
        surveyor = Surveyor(commands=InstalledCommands(), query_seconds=_ONCE_SECONDS)
        yield from limit_findings(cluster, kinds, surveyor)
        taken = yield from _taken(kinds, surveyor)
        yield from _on_nodes(examinee, taken, sights)
    hosts = {sight.node.host for sight in sights if not sight.node.storage_problem}
    yield from folder_findings(examinee.root, examinee.storage, on_cluster=True, seen_from=hosts)


def _taken(kinds: Sequence[JobKind], surveyor: Surveyor) -> Generator[Finding, None, list[JobKind]]:
    """Ask sbatch about jobs of every kind; return the kinds that it would take."""
    taken = []
    for kind in kinds:
        check = f"sbatch --test-only, {kind.name}"
        level: Level = "fail"
        try:
            lines = refusals(kind, surveyor)
        except FedllmError as error:
            lines, level = [str(error)], "not done"
        yield from (Finding(check=check, level=level, found=line) for line in lines)
        if lines:
            why = "sbatch has to take such jobs first"
            yield Finding(check=f"compute node for {kind.name}", level="not done", found=why)
        else:
            taken.append(kind)
    if taken:
        names = "jobs of every kind" if len(taken) == len(kinds) else _names(taken)
        found = f"{names} would be taken"
        yield Finding(check="sbatch --test-only", level="ok", found=found)
    return taken


def _names(kinds: Sequence[JobKind]) -> str:
    return ", ".join(kind.name for kind in kinds)


def _on_nodes(
    examinee: DoctorRequest, kinds: Sequence[JobKind], sights: list[ProbeResult]
) -> Iterator[Finding]:
    """Send a probe to the nodes that jobs get, one for jobs of equal options."""
    alike: dict[object, list[JobKind]] = {}
    for kind in kinds:
        alike.setdefault(node_options(kind.flags), []).append(kind)
    if not alike:
        return
    parent = nearest_folder(examinee.root)
    try:
        with trial_folder(parent) as folder, ThreadPoolExecutor(len(alike)) as pool:
            names = [_names(group) for group in alike.values()]
            if len(alike) == 1 and len(kinds) == len(examinee.kinds):
                names = ["every kind of job"]
            for found in pool.map(partial(_probed, examinee, folder), alike.values(), names):
                yield from found.findings
                sights += found.sights
    except RunDirectoryError as error:
        yield Finding(check="compute nodes", level="not done", found=str(error))


@dataclass(frozen=True, kw_only=True)
class _Probed:
    findings: list[Finding]
    sights: list[ProbeResult]


def _probed(examinee: DoctorRequest, folder: Path, kinds: Sequence[JobKind], name: str) -> _Probed:
    """Probe the node that jobs of these kinds get; what comes in between is a finding, too."""
    own = folder / uuid.uuid4().hex
    make_folder(own)
    probe = Probe(
        section=examinee.scheduler,
        flags=kinds[0].flags,
        folder=own,
        also=tuple(_needed_there(examinee)),
        node_local=examinee.storage.node_local,
        visibility_seconds=examinee.storage.visibility_seconds,
        wait_seconds=examinee.wait_seconds,
    )
    check = f"compute node for {name}"
    try:
        sight = probe.run()
    except ProbeWaits as error:
        change = "ask again when nodes are free, or with more patience: fedllm doctor --wait 3600"
        finding = Finding(check=check, level="not done", found=str(error), change=change)
        return _Probed(findings=[finding], sights=[])
    except FedllmError as error:
        change = "scheduler.python, scheduler.setup: what starts Python in a job"
        finding = Finding(check=check, level="fail", found=str(error), change=change)
        return _Probed(findings=[finding], sights=[])
    flags = kinds[0].flags
    wanted = NodeRequirements(
        key=f"scheduler.sbatch.{kinds[0].program}",
        cpus=int(flags.get("cpus-per-task", 1)),
        gpus=asks_for_gpus(dict(flags)),
        versions=dict(installed_versions()),
        visibility_seconds=examinee.storage.visibility_seconds,
        node_local=examinee.storage.node_local,
        submits=any(kind.program == "coordinator" for kind in kinds),
    )
    return _Probed(findings=node_findings(name, sight, wanted, folder.parent), sights=[sight])


def _needed_there(examinee: DoctorRequest) -> Iterator[Path]:
    """Yield what jobs read beside the run directory, where it is here."""
    yield shipped("jobs")
    yield cache_of(examinee.storage.cache, examinee.root).root
    if examinee.config is not None:
        for path in (examinee.config.model.path, examinee.config.data.path):
            yield Path(path).expanduser().absolute()
