"""A cluster's settings, the jobs of a configuration, and whether Slurm would take them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.config.models import SchedulerSection
from fedllm.errors import ConfigError, FedllmError
from fedllm.planning.classes import classes_of, job_options, tier_options
from fedllm.planning.engines import Engine, job_size
from fedllm.scheduling.slurm.check import job_problems
from fedllm.scheduling.slurm.commands import CommandRefused, call, clean_environment
from fedllm.scheduling.slurm.coordinator_job import coordinator_flags
from fedllm.scheduling.slurm.free_capacity import Surveyor
from fedllm.scheduling.slurm.notation import entities, settings
from fedllm.scheduling.slurm.sbatch_flags import (
    Flags,
    key_of,
    sbatch_flags,
    task_defaults,
)
from fedllm.scheduling.slurm.script import size_flags

Settings = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """A kind of job and the options it is submitted with.

    Args:
        name: `client type1`, `aggregate`.
        program: the section of `scheduler.sbatch` with its options.
        flags: sbatch's flags.
        section: the scheduler's configuration.
    """

    name: str
    program: str
    flags: Flags
    section: SchedulerSection

    def key(self, option: str) -> str:
        """Return the configuration key that sets an option, or could set it."""
        value = self.flags.get(option)
        return key_of(option, value, sbatch=self.section.sbatch, program=self.program)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Slurm's settings, of the controller and of each partition.

    Attributes:
        controller: `scontrol show config`.
        partitions: name -> `scontrol show partition`.
        accounting_problem: why the accounting does not answer; empty: it does, or there is none.
    """

    controller: Settings
    partitions: Mapping[str, Settings]
    accounting_problem: str = ""

    @property
    def accounting(self) -> str:
        """The kind of accounting; empty: there is none."""
        kind = self.controller.get("AccountingStorageType", "").rpartition("/")[2]
        return "" if kind in {"none", "(null)"} else kind

    def partitions_of(self, kind: JobKind) -> list[str]:
        """Return the partitions that jobs of a kind may run in."""
        site = clean_environment(configured=kind.flags).get("SBATCH_PARTITION")
        names = kind.flags.get("partition") or site
        if names:
            return [name for name in str(names).split(",") if name in self.partitions]
        return [name for name, p in self.partitions.items() if p.get("Default") == "YES"]


def job_kinds(section: SchedulerSection, tiers: Mapping[str, Engine]) -> list[JobKind]:
    """Return all kinds of jobs that a configuration submits; workers have one kind per class.

    Raises:
        ConfigError: an option that only fedllm sets.
    """
    sbatch = section.sbatch
    classes = classes_of(sbatch, tiers)
    options_of = {
        f"client {', '.join(t for t, own in classes.items() if own == name)}": (
            "client",
            tier_options(sbatch, name),
            tiers[name].size,
        )
        for name in classes.values()
    }
    for program in ("prepare", "aggregate", "evaluate"):
        options_of[program] = (program, job_options(sbatch, program), job_size(program, tiers))
    kinds = []
    for name, (program, options, size) in options_of.items():
        defaults = task_defaults(options)
        flags = sbatch_flags(options, sbatch=sbatch, program=program, defaults=defaults)
        flags = {**flags, **size_flags(size)}
        kinds.append(JobKind(name=name, program=program, flags=flags, section=section))
    return [*kinds, _coordinator(section)]


def _coordinator(section: SchedulerSection) -> JobKind:
    flags = coordinator_flags(section)
    return JobKind(name="coordinator", program="coordinator", flags=flags, section=section)


def ask_cluster() -> Cluster:
    """Return the settings of the cluster of this host.

    Raises:
        UserError: Slurm's commands are not installed, or find no cluster.
        SchedulerUnreachable: slurmctld does not answer now.
    """
    controller = settings(_output("scontrol", "show", "config"))
    listed = _output("scontrol", "--all", "--oneliner", "show", "partition")
    partitions = entities(listed, "PartitionName")
    cluster = Cluster(controller=controller, partitions=partitions)
    if not cluster.accounting:
        return cluster
    return Cluster(
        controller=controller, partitions=partitions, accounting_problem=_accounting_problem()
    )


def refusals(kind: JobKind, surveyor: Surveyor) -> list[str]:
    """Return reasons why Slurm would refuse jobs of a kind, or never start them; submit nothing.

    Raises:
        SchedulerUnreachable: slurmctld does not answer now.
    """
    return list(
        job_problems(
            kind.flags,
            section=kind.section,
            program=kind.program,
            survey=surveyor.survey(kind.flags),
            test=_test,
        )
    )


def _test(words: Sequence[str], flags: Flags) -> None:
    call(words, environment=clean_environment(configured=flags))


def _accounting_problem() -> str:
    try:
        call(["sacctmgr", "--noheader", "show", "cluster"])
    except (CommandRefused, FedllmError) as error:
        return str(error)
    return ""


def _output(*words: str) -> str:
    try:
        return call(words)
    except CommandRefused as error:
        raise ConfigError(f"{words[0]}: {error}") from error
