"""Virtual environments of other frameworks, made from the package index with pinned versions."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
SHARED = (
    TORCH,
    "transformers==5.23.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "safetensors==0.8.0",
    "pyyaml==6.0.3",
)
ENVIRONMENTS = {
    "flower": (*SHARED, "flwr[simulation]==1.41.0"),
    "pfl": (*SHARED, "pfl[pytorch]==0.6.0"),
    "published": SHARED,
}
_INSTALLED = "installed.txt"


class NotMeasured(Exception):
    """A peer could not be installed, or its run failed: the message says why, in a line."""


def environment(name: str, folder: Path) -> Path:
    """Return the Python of an environment; make it where it is missing or has other pins.

    Raises:
        NotMeasured: the environment could not be made.
    """
    pins = ENVIRONMENTS[name]
    home = folder / name
    stamp, python = home / _INSTALLED, home / "bin" / "python"
    if stamp.is_file():
        if stamp.read_text(encoding="utf-8").split() == list(pins):
            return python
        stamp.unlink()
    _call([sys.executable, "-m", "venv", "--clear", str(home)])
    # PyTorch first and alone: what follows then asks for no other build of it
    for wanted in ([TORCH], pins):
        _call([str(python), "-m", "pip", "install", "--quiet", *wanted])
    stamp.write_text("\n".join(pins) + "\n", encoding="utf-8")
    return python


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), (said or ["?"])[-1])
        raise NotMeasured(f"{' '.join(command[1:4])} exited {done.returncode}: {reason}")
