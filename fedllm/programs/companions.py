"""Further processes of a command on this host: they run its command line, and compute with it."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from fedllm.errors import ProcessLost
from fedllm.process.parent import end_with_parent
from fedllm.scheduling.environment import (
    TaskEnvironment,
    TaskIdentity,
    process_variables,
    task_variables,
)
from fedllm.scheduling.heap import with_heap_settings

_HOST = "127.0.0.1"
_GRACE_SECONDS = 30.0


@contextmanager
def companions(num_processes: int, command: Sequence[str]) -> Iterator[TaskIdentity]:
    """Start the other processes of a command; yield the place of this one among them.

    In a process that is one of several already, as one that this function started, nothing starts.

    Args:
        num_processes: the number of processes, this one included.
        command: the command line of the others.

    Raises:
        ProcessLost: one of them ended early; the message has the last line of its errors.
    """
    identity = TaskEnvironment().identity
    if num_processes == 1 or identity.num_processes > 1:
        if not identity.is_first:
            end_with_parent()
        yield identity
        return
    with socket.create_server((_HOST, 0)) as server:
        rendezvous = f"{_HOST}:{server.getsockname()[1]}"
    # outside a job each process would be a task of its own, and they would never meet
    task = task_variables(identity.task, identity.log)
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_processes - 1)]
        started = [
            _start(command, process_variables(rank, num_processes, rendezvous) | task, log)
            for rank, log in enumerate(logs, 1)
        ]
        stack.callback(_end, started)
        own = process_variables(0, num_processes, rendezvous) | task
        try:
            yield TaskEnvironment(variables={**os.environ, **own}).identity
            for process in started:
                process.wait(_GRACE_SECONDS)
        except ProcessLost as error:
            raise ProcessLost(f"{error}: {_last_line(logs)}") from error


def _start(
    command: Sequence[str], variables: dict[str, str], log: IO[bytes]
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        env=with_heap_settings({**os.environ, **variables}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
    )


def _end(started: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in started:
        process.kill()
        process.wait()


def _last_line(logs: Sequence[IO[bytes]]) -> str:
    for log in logs:
        log.seek(0)
        if lines := log.read().decode("utf-8", "replace").strip().splitlines():
            return lines[-1]
    return "it says nothing"
