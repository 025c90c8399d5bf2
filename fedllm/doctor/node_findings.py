"""Findings about a compute node, from its probe, and findings as text."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.doctor.findings import Finding
from fedllm.doctor.trials import ProbeResult
from fedllm.reporting.tables import size
from fedllm.storage.trust.secret import STATE_VARIABLE

# a delay above this share of the limit is too close to it
_NEARLY = 0.5


@dataclass(frozen=True, kw_only=True)
class NodeRequirements:
    """Requirements of tasks on a node.

    Attributes:
        key: the section of the configuration with their options.
        cpus: processors of a task.
        gpus: whether a task asks for GPUs.
        versions: package -> version on this host.
        visibility_seconds: how long a new file may stay invisible.
        node_local: `storage.node_local`.
        submits: whether the coordinator may run there, which submits jobs.
        secret: the digest of the user's secret here; empty: the first coordinator makes one.
    """

    key: str
    cpus: int
    gpus: bool
    versions: Mapping[str, str]
    visibility_seconds: float
    node_local: str | None
    submits: bool
    secret: str = ""


def node_findings(
    name: str, result: ProbeResult, needs: NodeRequirements, folder: Path
) -> list[Finding]:
    """Return the findings of a probe on the node that tasks `name` get; `folder` will hold runs."""
    node = result.node
    at = f"node {node.node} ({name})"
    return [
        _shared_folder(f"{at}: sees {folder}", result, needs),
        _packages(f"{at}: packages", result, needs),
        _gpus(f"{at}: GPUs", result, needs),
        _processors(f"{at}: processors", result, needs),
        _own_folder(f"{at}: storage.node_local", result, needs),
        _commands(f"{at}: Slurm's commands", result, needs),
        _secret(f"{at}: {STATE_VARIABLE}", result, needs),
    ]


def _shared_folder(check: str, result: ProbeResult, needs: NodeRequirements) -> Finding:
    node = result.node
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
    delays = {"there": result.seen_there, "here": result.seen_here}
    allowed = needs.visibility_seconds
    late = [side for side, seconds in delays.items() if seconds is None]
    if late:
        found = f"a new file was not seen {' and '.join(late)} within {allowed:.0f} s"
        change = "raise storage.visibility_seconds above the caches' time of the file system"
        return Finding(check=check, level="fail", found=found, change=change)
    slowest = max(seconds for seconds in delays.values() if seconds is not None)
    found = (
        f"files seen there after {result.seen_there:.1f} s, here after {result.seen_here:.1f} s "
        f"(allowed: {allowed:.0f} s); {_clock(result.clock_seconds)}"
    )
    if slowest > allowed * _NEARLY:
        change = "storage.visibility_seconds: leaves little over that; raise it"
        return Finding(check=check, level="warn", found=found, change=change)
    return Finding(check=check, level="ok", found=found)


def _clock(seconds: float) -> str:
    side = "ahead" if seconds > 0 else "behind"
    return f"its clock is {abs(seconds):.1f} s {side}, on which nothing depends"


def _packages(check: str, result: ProbeResult, needs: NodeRequirements) -> Finding:
    node = result.node
    change = "scheduler.python and scheduler.setup: start the environment that is used here"
    if node.broken:
        broken = "; ".join(f"{name} ({why})" for name, why in node.broken.items())
        found = f"cannot be imported by {node.python}: {broken}"
        return Finding(check=check, level="fail", found=found, change=change)
    other = [
        f"{name} {node.versions.get(name, 'absent')} (here {version})"
        for name, version in needs.versions.items()
        if node.versions.get(name) != version
    ]
    if other:
        found = f"other versions than here: {', '.join(other)}"
        return Finding(check=check, level="fail", found=found, change=change)
    same = ", ".join(f"{name} {node.versions[name]}" for name in needs.versions)
    return Finding(check=check, level="ok", found=f"Python {node.python}; as here: {same}")


def _gpus(check: str, result: ProbeResult, needs: NodeRequirements) -> Finding:
    seen = ", ".join(f"{n} x {name}" for name, n in Counter(result.node.gpus).items())
    if not needs.gpus:
        return Finding(check=check, level="ok", found=f"none requested; {seen or 'none'} seen")
    if seen:
        return Finding(check=check, level="ok", found=seen)
    torch = result.node.versions.get("torch", "absent")
    found = f"requested, but torch {torch} sees none"
    change = f"install torch with CUDA for this node's driver, or ask for none in {needs.key}"
    return Finding(check=check, level="fail", found=found, change=change)


def _processors(check: str, result: ProbeResult, needs: NodeRequirements) -> Finding:
    node = result.node
    memory = f"memory limit {size(node.memory_bytes)}" if node.memory_bytes else "no memory limit"
    found = f"{node.cpus} may be used, {memory}"
    if node.cpus < needs.cpus:
        change = f"{needs.key}.cpus_per_task: need {needs.cpus}"
        return Finding(check=check, level="warn", found=found, change=change)
    return Finding(check=check, level="ok", found=found)


def _own_folder(check: str, result: ProbeResult, needs: NodeRequirements) -> Finding:
    if needs.node_local is None:
        return Finding(check=check, level="not done", found="storage.node_local is not set")
    if result.node.local_bytes is None:
        change = "name a folder on the node's own disk that jobs may write"
        problem = result.node.local_problem
        return Finding(check=check, level="fail", found=problem, change=change)
    found = f"{needs.node_local}: {size(result.node.local_bytes)} free"
    return Finding(check=check, level="ok", found=found)


def _secret(check: str, result: ProbeResult, needs: NodeRequirements) -> Finding:
    """Return whether tasks can sign updates so that the coordinator believes them."""
    if not needs.secret:
        found = "no secret yet: the first run makes one, then this can be checked"
        return Finding(check=check, level="not done", found=found)
    if result.node.secret == needs.secret:
        return Finding(check=check, level="ok", found="the secret that signs updates is the same")
    found = result.node.secret_problem or "the node has another secret: no update would be believed"
    change = f"{STATE_VARIABLE}: a folder of yours that all nodes see and nobody else can read"
    return Finding(check=check, level="fail", found=found, change=change)


def _commands(check: str, result: ProbeResult, needs: NodeRequirements) -> Finding:
    refused = result.node.refused
    if not refused:
        return Finding(check=check, level="ok", found="sbatch, squeue and scontrol work there")
    found = "; ".join(f"{name} does not work there: {why}" for name, why in refused.items())
    change = (
        "run the coordinator elsewhere: `fedllm run` where sbatch works, or `fedllm advance RUN` "
        "from cron there"
    )
    return Finding(check=check, level="warn" if needs.submits else "ok", found=found, change=change)
