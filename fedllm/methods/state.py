"""A module's state as it is carried between rounds: float32, whole and finite."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.errors import AdapterError
from fedllm.methods.protocol import ModuleState


def carried(module: str, parts: Mapping[str, Tensor]) -> ModuleState:
    """Return `parts` as contiguous float32.

    Raises:
        AdapterError: a value does not fit.
    """
    state = {name: part.to(torch.float32).contiguous() for name, part in parts.items()}
    for name, part in state.items():
        if not all_finite(part):
            raise AdapterError(
                f"{module}: the aggregated {name} does not fit float32: "
                "lower the learning rate or leave the diverged update out"
            )
    return state


def all_finite(values: Tensor) -> bool:
    """Return whether all values are finite, in one pass and without extra memory."""
    if not values.numel():
        return True
    smallest, largest = torch.aminmax(values)
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))
