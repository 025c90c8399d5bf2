"""Processes that train together in a test: started, waited for, and connected by gloo."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fedllm.scheduling.heap import with_heap_settings

PATIENCE_SECONDS = 900.0
_GROUP = ("TEST_RANK", "TEST_PROCESSES", "TEST_PORT")


def run_together(
    module: str, arguments: Sequence[object], *, processes: int, log: Path, says: bool = False
) -> str:
    """Run a module of the tests in several processes; return what the first one says.

    Raises:
        AssertionError: one fails, or says anything unless `says`.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    logs = [log.with_name(f"{log.name}.{rank}.log") for rank in range(processes)]
    started = []
    for rank, path in enumerate(logs):
        group = dict(zip(_GROUP, map(str, (rank, processes, port)), strict=True))
        with path.open("wb") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, arguments)],
                    env=with_heap_settings({**os.environ, **group}),
                    stdout=file,
                    stderr=file,
                )
            )
    try:
        ends = [process.wait(PATIENCE_SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert not any(ends), "\n".join(path.read_text() for path in logs)
    # nothing was compiled, and MPI was not looked for
    assert says or not any(path.read_text() for path in logs), logs[0].read_text()
    return logs[0].read_text()


def place() -> tuple[int, int, int]:
    """The rank of this process, the number of processes, and the port where they meet."""
    rank, processes, port = (int(os.environ[name]) for name in _GROUP)
    return rank, processes, port


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the other processes of `run_together`; yield the rank and their number."""
    torch.set_num_threads(1)
    rank, processes, port = place()
    if processes > 1:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, processes, is_master=rank == 0, timeout=timedelta(minutes=2)
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    yield rank, processes
    if processes > 1:
        dist.destroy_process_group()
