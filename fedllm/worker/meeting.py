"""How the processes of a task find each other: the first one listens, the others call it.

The rendezvous names a host and a port. Where another program has that port, the first process takes
the next one of a sequence that all know, and the others try the sequence until a process of their
own task answers. The connections stay open: see `watching`.
"""

import errno
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from fedllm.errors import ProcessLost, UserError
from fedllm.scheduling.environment import TaskIdentity

# time for all processes to start
START_SECONDS = 600.0
# time for an answer; whoever has the port may be another program, which never answers
_ANSWER_SECONDS = 5.0
_PAUSE_SECONDS = 0.2
_NUM_PORTS = 16
# far apart: tasks that start together have rendezvous ports that follow each other
_STRIDE = 997
_LOWEST, _HIGHEST = 1024, 65535
_MAX_LINE = 8192


@dataclass(frozen=True, kw_only=True)
class Met:
    """The processes of a task that this one is connected with, and where their store is.

    Attributes:
        connections: rank -> connection; the first process has all others, they have the first.
        logs: rank -> log, of the same processes.
        host: the host of the first process.
        store_port: the port of its store.
    """

    connections: Mapping[int, socket.socket]
    logs: Mapping[int, str]
    host: str
    store_port: int


def address_of(rendezvous: str) -> tuple[str, int]:
    """Return host and port of a rendezvous.

    Raises:
        UserError: it is missing, or not host:port.
    """
    host, _, port = rendezvous.rpartition(":")
    if host and port.isdecimal() and 0 < int(port) <= _HIGHEST:
        return host, int(port)
    raise UserError(
        f"FEDLLM_RENDEZVOUS: got {rendezvous!r}, but the processes of a task (FEDLLM_PROCESSES) "
        "need one place to meet; set it to HOST:PORT of the first one, the same for all"
    )


def ports_from(first: int) -> Iterator[int]:
    """Yield the ports to try, in the order of all processes."""
    size = _HIGHEST + 1 - _LOWEST
    return (_LOWEST + (first - _LOWEST + _STRIDE * n) % size for n in range(_NUM_PORTS))


def listen(rendezvous: str) -> socket.socket:
    """Return a listening socket at the first free port.

    Raises:
        ProcessLost: none of the ports is free.
    """
    _, first = address_of(rendezvous)
    for port in ports_from(first):
        with suppress(OSError):
            return _server(port)
    raise ProcessLost(f"{rendezvous}: none of {_NUM_PORTS} ports from there is free; start again")


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        try:
            return socket.create_server(
                ("", port), family=family, backlog=1024, dualstack_ipv6=True
            )
        except OSError as error:
            # a kernel that knows IPv6 may have no address of it
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=1024)


def receive_others(
    server: socket.socket, identity: TaskIdentity, store_port: int, seconds: float = START_SECONDS
) -> Met:
    """Wait until all other processes have called; tell them where the store is.

    Raises:
        ProcessLost: some did not call in time; it names them.
    """
    connections: dict[int, socket.socket] = {}
    logs = {identity.rank: identity.log}
    end = time.monotonic() + seconds
    while len(connections) < identity.num_processes - 1:
        server.settimeout(max(0.01, end - time.monotonic()))
        try:
            caller, _ = server.accept()
        except TimeoutError as error:
            absent = [n for n in range(1, identity.num_processes) if n not in connections]
            raise ProcessLost(
                f"{identity.task}: {processes_text(absent, identity.num_processes)} did not "
                f"come to {identity.rendezvous} within {seconds / 60:g} minutes"
            ) from error
        name, _, rest = _line(caller).partition(" ")
        rank, _, log = rest.partition(" ")
        if name != _name(identity) or not rank.isdecimal():
            caller.close()
            continue
        # who gave up to wait calls again
        with suppress(OSError):
            caller.sendall(f"{_name(identity)} {store_port} {identity.log}\n".encode())
            connections[int(rank)], logs[int(rank)] = caller, log
    return Met(
        connections=connections,
        logs=logs,
        host=address_of(identity.rendezvous)[0],
        store_port=store_port,
    )


def call_first(identity: TaskIdentity, seconds: float = START_SECONDS) -> Met:
    """Call the first process until it answers.

    Raises:
        ProcessLost: it did not answer in time.
    """
    host, first = address_of(identity.rendezvous)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for port in ports_from(first):
            if met := _call(host, port, identity):
                return met
        time.sleep(_PAUSE_SECONDS)
    raise ProcessLost(
        f"{identity.task}: process {identity.rank} of {identity.num_processes} did not find the "
        f"first one at {identity.rendezvous} within {seconds / 60:g} minutes; see its log, and "
        "whether the nodes reach each other (fedllm doctor)"
    )


def _call(host: str, port: int, identity: TaskIdentity) -> Met | None:
    """Return the first process if it is who listens there."""
    try:
        connection = socket.create_connection((host, port), timeout=_ANSWER_SECONDS)
    except OSError:
        return None
    with suppress(OSError):
        connection.sendall(f"{_name(identity)} {identity.rank} {identity.log}\n".encode())
        name, _, rest = _line(connection).partition(" ")
        store_port, _, log = rest.partition(" ")
        if name == _name(identity) and store_port.isdecimal():
            return Met(
                connections={0: connection}, logs={0: log}, host=host, store_port=int(store_port)
            )
    connection.close()
    return None


def _line(connection: socket.socket) -> str:
    """Return the line that the other side sends; empty: it sends none in time."""
    connection.settimeout(_ANSWER_SECONDS)
    said = b""
    with suppress(OSError):
        while not said.endswith(b"\n") and len(said) < _MAX_LINE:
            part = connection.recv(1)
            if not part:
                break
            said += part
    return said.decode(errors="replace").rstrip("\n")


def _name(identity: TaskIdentity) -> str:
    """Return what tells this start of a task from all others; it has no space."""
    return f"fedllm/{identity.task}/{identity.restarts or 0}".replace(" ", "_")


def processes_text(ranks: list[int], count: int) -> str:
    """Return `process 1 of 4`, or `processes 1, 2 of 4`."""
    many = "es" if len(ranks) > 1 else ""
    return f"process{many} {', '.join(map(str, ranks))} of {count}"
