"""What a result depends on beside its inputs: versions, processor, threads, precision."""

import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from fedllm.config.models import TrainingSection

_PACKAGES = ("torch", "transformers", "peft")
# rounds of bfloat16 were once trained with sums in bfloat16: a run that has both is reported
_PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16 with sums in float32"}


def environment(training: TrainingSection, device: str, quantisation: str = "") -> dict[str, str]:
    """Return what must be equal for updates to be bit-identical.

    Args:
        training: how clients train.
        device: where.
        quantisation: of the base; see `model.base.Base`.
    """
    return {
        **_versions(),
        "processor": processor(),
        "threads": str(training.threads),
        "precision": _PRECISIONS[training.precision],
        "device": _device_name(device),
        **({"quantisation": quantisation} if quantisation else {}),
    }


@cache
def _versions() -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES}


@cache
def processor() -> str:
    """Return this machine's processor: mathematics libraries choose their kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("vendor_id", "cpu family", "model", "model name")
    found = [line.partition(":") for line in lines[: lines.index("") if "" in lines else None]]
    parts = {key.strip(): value.strip() for key, _, value in found}
    return ", ".join(parts[key] for key in wanted if key in parts) or platform.machine()


@cache
def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
