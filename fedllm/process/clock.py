"""The age of this process."""

import os
from pathlib import Path

from fedllm.storage.lease import process_start_time


def process_seconds() -> float:
    """Return the seconds since this process began; 0 where the system does not tell."""
    started = process_start_time(os.getpid())
    if started is None:
        return 0.0
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    # a container may count its own uptime
    return max(0.0, uptime - int(started) / os.sysconf("SC_CLK_TCK"))
