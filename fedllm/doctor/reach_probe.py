"""A probe of a task of several processes: whether they reach each other, and how fast."""

import shlex
import uuid
from dataclasses import dataclass
from pathlib import Path

from fedllm.config.models import SchedulerSection
from fedllm.doctor.findings import Finding
from fedllm.doctor.node_probe import (
    ProbeFailed,
    ProbeWaits,
    answer_of,
    node_of,
    running_step,
    script_of,
    srun_words,
)
from fedllm.doctor.trials import NetworkRecord, ReachRecord
from fedllm.reporting.tables import size
from fedllm.scheduling.slurm.sbatch_flags import Flags
from fedllm.scheduling.slurm.script import interface_lines

# time to start Python and torch in every process, and for all of them to meet
_ANSWER_SECONDS = 300.0
_RENDEZVOUS = "rendezvous.json"


@dataclass(frozen=True, kw_only=True)
class ReachProbe:
    """A probe with the processes and nodes of a task.

    Args:
        section: the scheduler's configuration.
        flags: the sbatch flags of the task, with its size.
        folder: a folder for this probe alone, on the storage of runs.
        wait_seconds: how long Slurm may take to give it nodes.
    """

    section: SchedulerSection
    flags: Flags
    folder: Path
    wait_seconds: float

    @property
    def processes(self) -> int:
        """The number of processes."""
        return int(self.flags.get("ntasks", 1))

    def findings(self, name: str) -> list[Finding]:
        """Return whether the processes of tasks `name` reach each other, and how fast."""
        check = f"processes of a task ({name})"
        network: list[NetworkRecord] = []
        try:
            return [self._found(check, network)]
        except ProbeWaits as error:
            change = "run it again when nodes are free, or wait longer: fedllm doctor --wait 3600"
            return [Finding(check=check, level="not done", found=str(error), change=change)]
        except ProbeFailed as error:
            there = ", ".join(sorted(network[0].interfaces)) if network else "see `ip address`"
            change = (
                "scheduler.interface: a network that all nodes of a task share (there: "
                f"{there}); open the ports between compute nodes"
            )
            return [Finding(check=check, level="fail", found=str(error), change=change)]

    def _found(self, check: str, network: list[NetworkRecord]) -> Finding:
        name = f"fedllm-doctor-{uuid.uuid4().hex[:8]}"
        words = srun_words(self.flags, name, _ANSWER_SECONDS, alone=False)
        python = ["-m", "fedllm.programs.probe_reach", str(self.folder / _RENDEZVOUS)]
        exports = [
            f"export FEDLLM_PROCESSES={self.processes} FEDLLM_TASK={shlex.quote(name)}",
            *interface_lines(self.section),
        ]
        words += ["bash", "-c", script_of(self.section, python, exports)]
        with running_step(words, self.flags, name) as step:
            node = node_of(step, name, self.wait_seconds)
            network.append(answer_of(step, node, NetworkRecord, _ANSWER_SECONDS))
            reach = answer_of(step, node, ReachRecord, _ANSWER_SECONDS)
        return Finding(check=check, level="ok", found=_described(network[0], reach))


def _described(network: NetworkRecord, reach: ReachRecord) -> str:
    places = ", ".join(dict.fromkeys(reach.nodes))
    rate = size(round(reach.bytes / reach.seconds))
    way = f"over {network.chosen}" if network.chosen else "over the network of the host name"
    return (
        f"{len(reach.nodes)} on {places} reach each other {way}: a sum of {size(reach.bytes)} "
        f"takes {reach.seconds:.3f} s ({rate} a second, {reach.backend})"
    )
