"""Idle resources of a cluster's nodes, and how many tasks fit them now.

Pure: output of `sinfo` and options of sbatch in, a count out.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedllm.scheduling.slurm.limits import Configuration, Partition
from fedllm.scheduling.slurm.notation import generic, hosts, mebibytes, rows, separated
from fedllm.scheduling.slurm.sbatch_flags import PROCESSES

NODE_COLUMNS = (
    *("NodeList", "StateLong", "CPUsState", "Threads", "Memory", "AllocMem", "Gres", "GresUsed"),
    "Features",
)
# a cloud's nodes take jobs while they are powered down or starting, too
_USABLE = re.compile(r"(idle|mixed)[~#+]?")
_FEATURES = re.compile(r"[\w.:-]+([&|][\w.:-]+)*")


@dataclass(frozen=True, kw_only=True)
class Node:
    """Idle resources of a node; GPUs by type."""

    name: str
    is_usable: bool
    is_idle: bool
    cpus: int
    threads_per_core: int
    memory_mib: float
    features: frozenset[str]
    gpus: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Resources that a task takes of each of its nodes; `memory_mib` None: all memory."""

    num_nodes: int = 1
    cpus: int = 1
    whole_cores: bool = False
    memory_mib: float | None = 0.0
    gpus: Mapping[str, int] = field(default_factory=dict)
    exclusive: bool = False
    constraint: str = ""
    only: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()

    def tres(self) -> dict[str, float]:
        """Return the resources that Slurm's accounting counts for a task, as far as known."""
        of_node = {
            "cpu": self.cpus,
            "mem": self.memory_mib or 0.0,
            "node": 1,
            "gres/gpu": sum(self.gpus.values()),
        }
        return {name: self.num_nodes * amount for name, amount in of_node.items()}


def nodes(output: str) -> list[Node]:
    """Read `sinfo --Node` with the columns above; a node of two partitions counts once."""
    by_name = {row["NodeList"]: _node(row) for row in rows(output, NODE_COLUMNS)}
    return list(by_name.values())


def _node(row: Mapping[str, str]) -> Node:
    used = generic(row["GresUsed"])
    # CPUsState: allocated/idle/other/total
    return Node(
        name=row["NodeList"],
        is_usable=_USABLE.fullmatch(row["StateLong"]) is not None,
        is_idle=row["StateLong"].startswith("idle"),
        cpus=int(row["CPUsState"].split("/")[1]),
        threads_per_core=int(row["Threads"]),
        memory_mib=float(row["Memory"]) - float(row["AllocMem"]),
        features=frozenset(row["Features"].split(",")),
        gpus={type_: all_ - used.get(type_, 0) for type_, all_ in generic(row["Gres"]).items()},
    )


def request(
    flags: Mapping[str, object], configuration: Configuration, partition: Partition | None
) -> Request:
    """Return the resources that sbatch options ask for.

    Raises:
        ValueError: an option cannot be read.
    """
    gpus = _gpus(flags)
    cpus = _processes(flags) * int(str(flags.get("cpus-per-task", 1)))
    cpus = max(cpus, sum(gpus.values()) * int(str(flags.get("cpus-per-gpu", 0))))
    default = (partition.default_memory if partition else None) or configuration.default_memory
    return Request(
        num_nodes=int(str(flags.get("nodes", 1))),
        cpus=cpus,
        whole_cores=any(name.startswith("CR_CORE") for name in configuration.selects),
        memory_mib=_memory(
            flags,
            default,
            cpus=cpus,
            gpus=sum(gpus.values()),
            counted=any("MEMORY" in name for name in configuration.selects),
        ),
        gpus=gpus,
        exclusive="exclusive" in flags,
        constraint=str(flags.get("constraint", "")),
        only=frozenset(hosts(str(flags.get("nodelist", "")))),
        without=frozenset(hosts(str(flags.get("exclude", "")))),
    )


def _processes(flags: Mapping[str, object]) -> int:
    """Return the processes of a task on one of its nodes."""
    return int(str(flags.get("ntasks", PROCESSES))) // int(str(flags.get("nodes", 1)))


def _gpus(flags: Mapping[str, object]) -> dict[str, int]:
    """Return the GPUs of a task on one of its nodes, by type."""
    if "gres" in flags:
        return generic(str(flags["gres"]))
    for option, times in (("gpus-per-node", 1), ("gpus-per-task", _processes(flags)), ("gpus", 1)):
        if option in flags:
            parts = [part.rpartition(":") for part in separated(str(flags[option]))]
            return {type_: times * int(count) for type_, _, count in parts}
    return {}


def _memory(
    flags: Mapping[str, object],
    default: Mapping[str, object],
    *,
    cpus: int,
    gpus: int,
    counted: bool,
) -> float | None:
    """Return the memory of a task in MiB; None: all of the node's, as without any option."""
    for options in (flags, default):
        for option, times in (("mem", 1), ("mem-per-cpu", cpus), ("mem-per-gpu", gpus)):
            if option in options:
                # `--mem=0` asks for all memory
                return mebibytes(options[option]) * times or None
    return None if counted else 0.0


def fitting(nodes: Iterable[Node], request: Request) -> int:
    """Return how many tasks could start now."""
    on_nodes = [_fitting(node, request) for node in nodes]
    # n tasks are on at most n different nodes, each on `num_nodes` of them
    return bisect_left(
        range(1, sum(on_nodes) // request.num_nodes + 1),
        True,
        key=lambda n: sum(min(n, room) for room in on_nodes) < n * request.num_nodes,
    )


def _fitting(node: Node, request: Request) -> int:
    if not node.is_usable or not _may_run_on(node, request) or request.cpus > node.cpus:
        return 0
    cpus = request.cpus
    if request.whole_cores:
        cpus = math.ceil(cpus / node.threads_per_core) * node.threads_per_core
    fits = [node.cpus // cpus]
    if request.exclusive or request.memory_mib is None:
        fits.append(1 if node.is_idle else 0)
    if request.memory_mib:
        fits.append(int(node.memory_mib // request.memory_mib))
    for type_, count in request.gpus.items():
        free = node.gpus.get(type_, 0) if type_ else sum(node.gpus.values())
        fits.append(free // count if count else fits[0])
    return max(0, min(fits))


def _may_run_on(node: Node, request: Request) -> bool:
    if node.name in request.without or (request.only and node.name not in request.only):
        return False
    features = request.constraint
    # only Slurm understands counts and brackets
    if not features or not _FEATURES.fullmatch(features) or {"&", "|"} <= set(features):
        return True
    if "|" in features:
        return not node.features.isdisjoint(features.split("|"))
    return node.features >= set(features.split("&"))
