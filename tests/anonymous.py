"""How much anonymous memory a piece of work takes, measured in a process of its own."""

import subprocess
import sys

PEAK = """
import sys, threading, time
from pathlib import Path

def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])

def watch() -> None:
    while True:
        peaks[0] = max(peaks[0], anonymous())
        time.sleep(0.001)

{imports}
torch.set_num_threads(1)
torch.linalg.eigh(torch.eye(8) @ torch.eye(8))  # what libraries allocate once
before = anonymous()
peaks = [before]
threading.Thread(target=watch, daemon=True).start()
{work}
print(peaks[0] - before)
"""


def peak_bytes(imports: str, work: str) -> int:
    """Return by how much the anonymous memory of a process of its own grew at its peak."""
    code = PEAK.format(imports=imports, work=work)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
