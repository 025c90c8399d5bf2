"""What a compute node told, judged, and findings as text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from fedllm.doctor.findings import Finding, Level
from fedllm.doctor.trials import ProbeResult
from fedllm.reporting.tables import size

# what is written in time only just will one day not be
_NEARLY = 0.5


@dataclass(frozen=True, kw_only=True)
class NodeRequirements:
    """What tasks need of a node.

    Attributes:
        key: where their options stand in the configuration.
        cpus: processors of a task.
        gpus: whether it asks for any.
        versions: package -> version here.
        visibility_seconds: how long a file may take to appear.
        node_local: `storage.node_local`.
        submits: whether the coordinator may run there.
    """

    key: str
    cpus: int
    gpus: bool
    versions: Mapping[str, str]
    visibility_seconds: float
    node_local: str | None
    submits: bool


def node_findings(
    name: str, sight: ProbeResult, wanted: NodeRequirements, folder: Path
) -> list[Finding]:
    """Judge what a probe found on the node that tasks `name` get; runs will lie in `folder`."""
    node = sight.node
    at = f"node {node.node} ({name})"
    return [
        _sight(f"{at}: sees {folder}", sight, wanted),
        _packages(f"{at}: packages", sight, wanted),
        _gpus(f"{at}: GPUs", sight, wanted),
        _processors(f"{at}: processors", sight, wanted),
        _own_folder(f"{at}: storage.node_local", sight, wanted),
        _commands(f"{at}: Slurm's commands", sight, wanted),
    ]


def _sight(check: str, sight: ProbeResult, wanted: NodeRequirements) -> Finding:
    node = sight.node
    shared = (
        "put runs on storage that all compute nodes share and mount at the same path "
        "(--run-dir, storage.cache, model.path, data.path)"
    )
    if node.storage_problem:
        found = f"node {node.node} cannot use it: {node.storage_problem}"
        return Finding(check=check, level="fail", found=found, change=shared)
    if node.absent:
        found = f"node {node.node} does not have {', '.join(node.absent)}"
        return Finding(check=check, level="fail", found=found, change=shared)
    delays = {"there": sight.seen_there, "here": sight.seen_here}
    allowed = wanted.visibility_seconds
    late = [side for side, seconds in delays.items() if seconds is None]
    if late:
        found = f"a new file was not seen {' and '.join(late)} within {allowed:.0f} s"
        change = "raise storage.visibility_seconds above the caches' time of the file system"
        return Finding(check=check, level="fail", found=found, change=change)
    slowest = max(seconds for seconds in delays.values() if seconds is not None)
    found = (
        f"files seen there after {sight.seen_there:.1f} s, here after {sight.seen_here:.1f} s "
        f"(allowed: {allowed:.0f} s); {_clock(sight.clock_seconds)}"
    )
    if slowest > allowed * _NEARLY:
        change = "storage.visibility_seconds: leaves little over that; raise it"
        return Finding(check=check, level="warn", found=found, change=change)
    return Finding(check=check, level="ok", found=found)


def _clock(seconds: float) -> str:
    side = "ahead" if seconds > 0 else "behind"
    return f"its clock is {abs(seconds):.1f} s {side}, on which nothing depends"


def _packages(check: str, sight: ProbeResult, wanted: NodeRequirements) -> Finding:
    node = sight.node
    change = "scheduler.python and scheduler.setup: start the environment that is used here"
    if node.broken:
        broken = "; ".join(f"{name} ({why})" for name, why in node.broken.items())
        found = f"cannot be imported by {node.python}: {broken}"
        return Finding(check=check, level="fail", found=found, change=change)
    other = [
        f"{name} {node.versions.get(name, 'absent')} (here {version})"
        for name, version in wanted.versions.items()
        if node.versions.get(name) != version
    ]
    if other:
        found = f"other versions than here: {', '.join(other)}"
        return Finding(check=check, level="fail", found=found, change=change)
    same = ", ".join(f"{name} {node.versions[name]}" for name in wanted.versions)
    return Finding(check=check, level="ok", found=f"Python {node.python}; as here: {same}")


def _gpus(check: str, sight: ProbeResult, wanted: NodeRequirements) -> Finding:
    seen = ", ".join(f"{n} x {name}" for name, n in Counter(sight.node.gpus).items())
    if not wanted.gpus:
        return Finding(check=check, level="ok", found=f"none asked for; {seen or 'none'} seen")
    if seen:
        return Finding(check=check, level="ok", found=seen)
    torch = sight.node.versions.get("torch", "absent")
    found = f"asked for, but torch {torch} sees none"
    change = f"install torch with CUDA for this node's driver, or ask for none in {wanted.key}"
    return Finding(check=check, level="fail", found=found, change=change)


def _processors(check: str, sight: ProbeResult, wanted: NodeRequirements) -> Finding:
    node = sight.node
    memory = f"memory limit {size(node.memory_bytes)}" if node.memory_bytes else "no memory limit"
    found = f"{node.cpus} may be used, {memory}"
    if node.cpus < wanted.cpus:
        change = f"{wanted.key}.cpus_per_task: need {wanted.cpus}"
        return Finding(check=check, level="warn", found=found, change=change)
    return Finding(check=check, level="ok", found=found)


def _own_folder(check: str, sight: ProbeResult, wanted: NodeRequirements) -> Finding:
    if wanted.node_local is None:
        return Finding(check=check, level="not done", found="storage.node_local is not set")
    if sight.node.local_bytes is None:
        change = "name a folder on the node's own disk that jobs may write"
        problem = sight.node.local_problem
        return Finding(check=check, level="fail", found=problem, change=change)
    found = f"{wanted.node_local}: {size(sight.node.local_bytes)} free"
    return Finding(check=check, level="ok", found=found)


def _commands(check: str, sight: ProbeResult, wanted: NodeRequirements) -> Finding:
    refused = sight.node.refused
    if not refused:
        return Finding(check=check, level="ok", found="sbatch, squeue and scontrol work there")
    found = "; ".join(f"{name} does not work there: {why}" for name, why in refused.items())
    change = (
        "run the coordinator elsewhere: `fedllm run` where sbatch works, or `fedllm advance RUN` "
        "from cron there"
    )
    return Finding(
        check=check, level="warn" if wanted.submits else "ok", found=found, change=change
    )


def describe_findings(findings: Sequence[Finding]) -> str:
    """Return findings as text: a line each, and one below with what to change."""
    width = max(len(finding.level) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<{width}}  {finding.check}: {finding.found}")
        if finding.change:
            lines.append(f"{'':<{width}}  -> {finding.change}")
    count = Counter(finding.level for finding in findings)
    total = ", ".join(f"{count[level]} {level}" for level in get_args(Level))
    return "\n".join([*lines, "", total])
