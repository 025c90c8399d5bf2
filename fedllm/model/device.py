"""The devices of tensors, by the names in a configuration."""

from collections.abc import Sequence

import torch

from fedllm.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device that a `device` key names; `auto` is the GPU if there is one.

    A GPU has its number, which is needed to make it the current device.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: got {name!r}, need auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: got {name!r}, no GPU is visible here; use auto or cpu")
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def resolve_devices(names: str | Sequence[str]) -> tuple[torch.device, ...]:
    """Return the devices that a key names: one, or a list.

    Raises:
        ConfigError: one of them does not exist.
    """
    return tuple(resolve_device(name) for name in ([names] if isinstance(names, str) else names))
