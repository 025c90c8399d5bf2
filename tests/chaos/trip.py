"""A process that came to the moment of a fault, and how to wait for what becomes of it."""

import os
import signal
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import psutil

# what a fault does from its trip on; it returns what was hit, once it landed
Handling = Generator[None, None, str]
Waiting = Generator[None, None, None]


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A process that came to the moment of a fault: it is dead, or stopped there."""

    pid: int
    about: str
    task: str
    node: str

    @property
    def who(self) -> str:
        """Name the process as a log should."""
        if self.task:
            return f"task {self.task} on {self.node}"
        job = f"job on {self.node}" if self.node else "process"
        return f"coordinator, {job}, pid {self.pid}"

    def is_dead(self) -> bool:
        """Say whether the process is gone."""
        return is_dead(self.pid)

    def is_stopped(self) -> bool:
        """Say whether the process stands still."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return False

    def is_told_to_end(self) -> bool:
        """Say whether a signal waits for the process to go on, or does not any more."""
        if not self.is_stopped():
            return True
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8")
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        pending = int(lines["ShdPnd"], 16) | int(lines["SigPnd"], 16)
        wanted = (signal.SIGTERM, signal.SIGUSR2)
        return any(pending & (1 << (number - 1)) for number in wanted)

    def go_on(self) -> None:
        """Let the stopped process go on, unless something ended it."""
        if not self.is_dead():
            os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process, unless something ended it."""
        if not self.is_dead():
            os.kill(self.pid, signal.SIGKILL)


def is_dead(pid: int) -> bool:
    """Say whether a process is gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stopped(trip: Trip) -> Waiting:
    """Wait until the process stands still at its moment."""
    while not trip.is_stopped():
        assert not trip.is_dead(), f"{trip.who} ended at its moment"
        yield


def stopped_or_dead(trip: Trip) -> Waiting:
    """Wait until the process does nothing: what ends a node may end it at its moment."""
    while not (trip.is_stopped() or trip.is_dead()):
        yield


def told_to_end(trip: Trip) -> Waiting:
    """Let a stopped process go on as soon as Slurm's signal waits for it."""
    while not trip.is_told_to_end():
        yield
    trip.go_on()


def dead(trip: Trip) -> Waiting:
    """Wait until the process is gone."""
    while not trip.is_dead():
        yield
