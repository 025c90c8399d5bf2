"""Energy of the device that trains, where it tells it: NVIDIA's NVML, or RAPL of the processors.

A counter is that of a whole device. Processes that share one each count all of it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
_MILLI, _MICRO = 1e-3, 1e-6
# joules since some time in the past
Counter = Callable[[], float]


class EnergyMeter:
    """Meter of the energy since it was made; it knows none where the device tells none.

    Args:
        counter: the device's counter of joules; None: it has none.
    """

    def __init__(self, counter: Counter | None) -> None:
        self._counter = counter
        self._begun = None if counter is None else _read(counter)

    def joules(self) -> float | None:
        """Return the joules since the meter was made; None: the device does not tell."""
        now = None if self._counter is None or self._begun is None else _read(self._counter)
        return None if now is None or self._begun is None else now - self._begun


def joules_of(earlier: float | None, later: float | None) -> float | None:
    """Return the energy of a training that was interrupted; None: a part of it is not known."""
    return None if earlier is None or later is None else earlier + later


def energy_counter(device: torch.device) -> Counter | None:
    """Return the counter of a device; None: there is none, or this user may not read it."""
    if device.type == "cuda":
        return _nvml_counter(device)
    return rapl_counter(POWERCAP)


def rapl_counter(powercap: Path) -> Counter | None:
    """Return the counter of all processor packages of this host together.

    Most systems let only root read it.
    """
    packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        counters = [_Rapl(path) for path in packages]
    except (OSError, ValueError):
        return None
    return _summed(counters) if counters else None


class _Rapl:
    """The counter of a package: it starts again at zero when it has reached its range."""

    def __init__(self, package: Path) -> None:
        self._file = package / "energy_uj"
        self._range = int((package / "max_energy_range_uj").read_text())
        self._last = int(self._file.read_text())
        self._turns = 0

    def __call__(self) -> float:
        """Return the joules."""
        now = int(self._file.read_text())
        self._turns += now < self._last
        self._last = now
        return _MICRO * (now + self._turns * self._range)


def _summed(counters: Sequence[Counter]) -> Counter:
    return lambda: sum(counter() for counter in counters)


def _nvml_counter(device: torch.device) -> Counter | None:
    if find_spec("pynvml") is None:
        return None
    nvml: Any = import_module("pynvml")
    try:
        nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # a driver or device without it: NVML's own errors, or missing names
        return None
    return lambda: _MILLI * float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def _read(counter: Counter) -> float | None:
    """Return a counter's value; None: it does not answer any more, which ends no training."""
    try:
        return counter()
    except Exception:
        return None
