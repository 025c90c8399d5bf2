"""The probe of `fedllm doctor` in each process of a task: `-m fedllm.programs.probe_reach FILE`.

The first process writes to FILE where the others meet it, prints its network, and then, once all
processes have summed a tensor together, how long that took.
"""

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fedllm.doctor.trials import NetworkRecord, ReachRecord, seconds_until
from fedllm.errors import FedllmError, ProcessLost
from fedllm.process.log import say
from fedllm.scheduling.environment import TaskEnvironment, TaskIdentity
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import Record

_NUMBERS = 1 << 22  # 16 MiB of float32
_TIMES = 5
_WAIT_SECONDS = 120.0
_WAIT_MINUTES = 2.0
_FIRST_PORT, _NUM_PORTS = 15000, 15000
_SIOCGIFADDR = 0x8915  # netdevice(7)


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit code."""
    place = Path(argv[0])
    identity = TaskEnvironment().identity
    try:
        meet(identity, place)
    except FedllmError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


def meet(identity: TaskIdentity, place: Path) -> None:
    """Meet the other processes and sum a tensor; the first process prints what it found.

    Raises:
        ProcessLost: they do not reach each other.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if identity.is_first:
        port = _FIRST_PORT + os.getpid() % _NUM_PORTS
        publish_bytes(place, f"{socket.gethostname()}:{port}".encode())
        found = NetworkRecord(node=identity.node, interfaces=interfaces(), chosen=chosen)
        _print(found)
    elif seconds_until(place.exists, max_seconds=_WAIT_SECONDS) is None:
        raise ProcessLost(f"process {identity.rank}: {place} did not appear on {identity.node}")
    summed = _sum(replace(identity, rendezvous=place.read_text("utf-8")))
    if identity.is_first:
        _print(summed)


def _sum(identity: TaskIdentity) -> ReachRecord:
    import torch
    import torch.distributed as dist

    from fedllm.worker.process_group import connected

    with connected(identity, wait_minutes=_WAIT_MINUTES, start_seconds=_WAIT_SECONDS):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        numbers = torch.ones(_NUMBERS, device=device)
        seconds = []
        for _ in range(_TIMES):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(numbers)
            float(numbers[0])  # on a GPU the sum is not there before it is read
            seconds.append(time.perf_counter() - begun)
        nodes: list[str] = [""] * identity.num_processes
        dist.all_gather_object(nodes, identity.node)
    return ReachRecord(
        nodes=nodes,
        bytes=4 * _NUMBERS,
        seconds=min(seconds),
        backend="NCCL" if device == "cuda" else "gloo",
    )


def interfaces() -> dict[str, str]:
    """Return network interface -> IPv4 address, of this node."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _print(record: Record) -> None:
    sys.stdout.write(record.model_dump_json() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
