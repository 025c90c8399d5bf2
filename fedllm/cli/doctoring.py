"""The command `doctor`: what stands in the way of a run, and what to change in which key."""

import dataclasses
import uuid
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.execution import default_run_dir
from fedllm.cli.options import AsJson, Overrides, RunDir, configuration, say, say_json
from fedllm.cli.surroundings import folder_findings, readiness_findings
from fedllm.config.models import Config, SchedulerSection, StorageSection
from fedllm.errors import ConfigError, FedllmError, RunDirectoryError
from fedllm.methods.table import check_names
from fedllm.planning.classes import asks_for_gpus
from fedllm.reporting.doctor import Wanted, describe_findings, node_findings
from fedllm.scheduling.slurm_capacity import Surveyor
from fedllm.scheduling.slurm_commands import InstalledCommands
from fedllm.scheduling.slurm_doctor import JobKind, ask_cluster, job_kinds, refusals
from fedllm.scheduling.slurm_findings import (
    cluster_findings,
    endings_findings,
    limit_findings,
    partition_findings,
)
from fedllm.scheduling.slurm_options import refuse_owned
from fedllm.scheduling.slurm_probe import Probe, ProbeWaits, probed
from fedllm.scheduling.slurm_script import log_pattern
from fedllm.scheduling.traits import traits_of
from fedllm.storage.findings import Finding, Level
from fedllm.storage.paths import RunPaths, cache_of, shipped
from fedllm.storage.publish import make_folder
from fedllm.storage.trials import Sight, existing, installed, trial_folder

# a question to Slurm is asked once, whatever the number of kinds of jobs
_ONCE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class _Patient:
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


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="Default: the cluster with its own defaults."),
    ] = None,
    run_dir: RunDir = None,
    set_: Overrides = None,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", help="For a compute node, where all are busy."),
    ] = 120.0,
    json_: AsJson = False,
) -> None:
    """Look for what stands in the way of a run: cluster, storage, compute nodes, configuration."""
    findings, patient = _admitted(config, run_dir, set_ or [], wait)
    if not json_:
        say("looking; a probe on every kind of compute node may take a minute")
    findings += [*_examined(patient)]
    if json_:
        say_json([dataclasses.asdict(finding) for finding in findings])
    else:
        say(describe_findings(findings))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(2)


def _admitted(
    file: Path | None, run_dir: Path | None, overrides: Sequence[str], wait: float
) -> tuple[list[Finding], _Patient]:
    findings, config = [], None
    if file is None:
        why = "no CONFIG was given: the cluster's own defaults are looked at"
        findings.append(Finding(check="configuration", level="not done", found=why))
    else:
        try:
            loaded = configuration(file, overrides)
            check_names(loaded.method.name, loaded.method.local)
            refuse_owned(loaded.scheduler)
            config = loaded
            findings.append(Finding(check="configuration", level="ok", found=f"{file} is valid"))
        except ConfigError as error:
            findings += [
                Finding(check="configuration", level="fail", found=line)
                for line in str(error).splitlines()
            ]
            why = "the cluster's own defaults are looked at until CONFIG is valid"
            findings.append(Finding(check="options of jobs", level="not done", found=why))
    root = run_dir or default_run_dir(file or Path("run"))
    patient = _Patient(
        scheduler=config.scheduler if config else SchedulerSection(),
        storage=config.storage if config else StorageSection(),
        root=root,
        config=config,
        wait_seconds=wait,
    )
    return findings, patient


def _examined(patient: _Patient) -> Iterator[Finding]:
    if patient.config is not None:
        yield from readiness_findings(patient.config, patient.root)
    if patient.uses_cluster:
        yield from _on_cluster(patient)
    else:
        why = f"scheduler.kind is {patient.scheduler.kind}: no cluster is used"
        yield Finding(check="slurm", level="not done", found=why)
        yield from folder_findings(patient.root, patient.storage, on_cluster=False)


def _on_cluster(patient: _Patient) -> Iterator[Finding]:
    sights: list[Sight] = []
    try:
        log_pattern(RunPaths(root=patient.root.resolve()).all_logs, "")
    except RunDirectoryError as error:
        yield Finding(check="run directory", level="fail", found=str(error))
    try:
        cluster = ask_cluster()
        kinds = patient.kinds
    except FedllmError as error:
        change = "start from a host of the cluster, or use scheduler.kind: local"
        yield Finding(check="slurm", level="fail", found=str(error), change=change)
        yield Finding(check="compute nodes", level="not done", found="Slurm has to answer first")
    else:
        yield from cluster_findings(cluster, patient.scheduler)
        yield from partition_findings(cluster, kinds)
        yield from endings_findings(cluster, kinds)
        surveyor = Surveyor(commands=InstalledCommands(), query_seconds=_ONCE_SECONDS)
        yield from limit_findings(cluster, kinds, surveyor)
        taken = yield from _taken(kinds, surveyor)
        yield from _on_nodes(patient, taken, sights)
    hosts = {sight.node.host for sight in sights if not sight.node.storage_problem}
    yield from folder_findings(patient.root, patient.storage, on_cluster=True, seen_from=hosts)


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
    patient: _Patient, kinds: Sequence[JobKind], sights: list[Sight]
) -> Iterator[Finding]:
    """Send a probe to the nodes that jobs get, one for jobs of equal options."""
    alike: dict[object, list[JobKind]] = {}
    for kind in kinds:
        alike.setdefault(probed(kind.flags), []).append(kind)
    if not alike:
        return
    parent = existing(patient.root)
    try:
        with trial_folder(parent) as folder, ThreadPoolExecutor(len(alike)) as pool:
            names = [_names(group) for group in alike.values()]
            if len(alike) == 1 and len(kinds) == len(patient.kinds):
                names = ["every kind of job"]
            for found in pool.map(partial(_probed, patient, folder), alike.values(), names):
                yield from found.findings
                sights += found.sights
    except RunDirectoryError as error:
        yield Finding(check="compute nodes", level="not done", found=str(error))


@dataclass(frozen=True, kw_only=True)
class _Probed:
    findings: list[Finding]
    sights: list[Sight]


def _probed(patient: _Patient, folder: Path, kinds: Sequence[JobKind], name: str) -> _Probed:
    """Probe the node that jobs of these kinds get; what comes in between is a finding, too."""
    own = folder / uuid.uuid4().hex
    make_folder(own)
    probe = Probe(
        section=patient.scheduler,
        flags=kinds[0].flags,
        folder=own,
        also=tuple(_needed_there(patient)),
        node_local=patient.storage.node_local,
        visibility_seconds=patient.storage.visibility_seconds,
        wait_seconds=patient.wait_seconds,
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
    wanted = Wanted(
        key=f"scheduler.sbatch.{kinds[0].program}",
        cpus=int(flags.get("cpus-per-task", 1)),
        gpus=asks_for_gpus(dict(flags)),
        versions=dict(installed()),
        visibility_seconds=patient.storage.visibility_seconds,
        node_local=patient.storage.node_local,
        submits=any(kind.program == "coordinator" for kind in kinds),
    )
    return _Probed(findings=node_findings(name, sight, wanted, folder.parent), sights=[sight])


def _needed_there(patient: _Patient) -> Iterator[Path]:
    """Yield what jobs read beside the run directory, where it is here."""
    yield shipped("jobs")
    yield cache_of(patient.storage.cache, patient.root).root
    if patient.config is not None:
        for path in (patient.config.model.path, patient.config.data.path):
            yield Path(path).expanduser().absolute()
