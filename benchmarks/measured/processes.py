"""What a process and all that it started use: memory and CPU time, sampled from /proc."""

import os
import signal
import subprocess
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 0.5
# reading it holds up the process: rarely
_SAMPLES_PER_PSS = 4
_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a command and all that it started used.

    `cpu` has pairs (seconds since the epoch, CPU seconds so far), the times growing.
    """

    returncode: int
    peak_pss_mib: float
    cpu: Sequence[tuple[float, float]]

    def cpu_between(self, begin: float, end: float) -> float:
        """Return the CPU seconds between two times, on straight lines between samples."""
        return self._cpu_at(end) - self._cpu_at(begin)

    def _cpu_at(self, moment: float) -> float:
        after = min(max(1, bisect_left(self.cpu, (moment, 0.0))), len(self.cpu) - 1)
        (before_time, before), (after_time, at_end) = self.cpu[after - 1], self.cpu[after]
        share = (moment - before_time) / (after_time - before_time)
        return before + min(1.0, max(0.0, share)) * (at_end - before)


def measured(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Usage:
    """Run a command to its end, and end what it leaves running; its output goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(environment))
        meter = _Meter(process.pid)
        try:
            code = process.wait()
        finally:
            meter.stop()
            meter.end_all()
    return Usage(returncode=code, peak_pss_mib=meter.peak / 2**20, cpu=meter.cpu)


def family(pid: int) -> list[int]:
    """Return a process and its descendants."""
    return _families([pid])


def _families(roots: Sequence[int]) -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _fields(stat)
        if fields:
            parents[int(stat.parent.name)] = int(fields[1])
    found = list(roots)
    for one in found:
        found += [c for c, parent in parents.items() if parent == one and c not in found]
    return found


class _Meter(threading.Thread):
    """Samples a process and its descendants until told to stop.

    A descendant stays one when its parent ends before it, as the parents of daemons do.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.cpu: list[tuple[float, float]] = []
        # process and when it started: a number is given again
        self._known = {pid: _start(pid)}
        self._over = threading.Event()
        self._sample()
        self.start()

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._over.wait(_SECONDS):
            self._sample()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self.join()

    def end_all(self) -> None:
        """Kill the processes that still run."""
        for pid in self._living():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _living(self) -> list[int]:
        return [pid for pid, start in self._known.items() if start and _start(pid) == start]

    def _sample(self) -> None:
        self._known |= {pid: _start(pid) for pid in _families(self._living())}
        living = self._living()
        self.cpu.append((time.time(), sum(map(_cpu_seconds, living))))
        if len(self.cpu) % _SAMPLES_PER_PSS == 1:
            self.peak = max(self.peak, sum(map(_pss, living)))


def _start(pid: int) -> str:
    """Return when a process started, in ticks since the system did; empty where it ended."""
    return (_fields(Path(f"/proc/{pid}/stat")) or [""] * 20)[19]


def _fields(stat: Path) -> list[str]:
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_seconds(pid: int) -> float:
    # with the time of the children that it waited for: what ended between samples counts too
    return _TICK * sum(map(int, _fields(Path(f"/proc/{pid}/stat"))[11:15]))


def _pss(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in text.splitlines() if x.startswith("Pss:")), 0)
