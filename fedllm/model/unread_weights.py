"""Weights of a base that stay in its files until processes divide them.

The files are mapped into memory, so that their pages belong to all processes of a node. A weight is
read, and converted to the base's number format, when a process takes its part of it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

_FORMATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class UnreadWeights:
    """The weights of a model by name, as its files hold them; taking one forgets it."""

    stored: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "UnreadWeights":
        """Take the weights out of a loaded model, and leave their shapes in format `dtype`.

        Until the weights are divided the model computes NaN.
        """
        stored = {}
        for name, weight in model.named_parameters():
            stored[name] = weight.data
            own = _format_of(model, name, dtype)
            weight.data = torch.full((), math.nan, dtype=own).expand(weight.shape)
        return cls(stored=stored)

    def take(self, model: nn.Module, device: torch.device) -> Iterator[nn.Parameter]:
        """Read one weight of the model after the other to a device; yield each.

        Weights of one format share a buffer: each is valid until the next one is read.
        """
        sizes: dict[torch.dtype, int] = {}
        for weight in model.parameters():
            sizes[weight.dtype] = max(weight.numel(), sizes.get(weight.dtype, 0))
        # a buffer for each weight would leave gaps in the heap between the parts that stay
        buffers = {dtype: torch.empty(n, dtype=dtype, device=device) for dtype, n in sizes.items()}
        for name, weight in model.named_parameters():
            read = buffers[weight.dtype][: weight.numel()].view(weight.shape)
            weight.data = read.copy_(self.stored.pop(name))
            yield weight


def set_format(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of a model that are no whole numbers to format `dtype`."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(_format_of(model, name, dtype))


def _format_of(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the format of a weight in a model of `dtype`: some are float32 in all."""
    causal: Any = model
    kept = causal._keep_in_fp32_modules_strict or ()
    return torch.float32 if any(part in name for part in kept) else dtype


def stored_format(shards: Iterable[Path]) -> torch.dtype | None:
    """Return the number format of most weights of safetensors files; None: there are none."""
    counts: dict[str, int] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                one = tensors.get_slice(name)
                size = math.prod(one.get_shape())
                counts[one.get_dtype()] = counts.get(one.get_dtype(), 0) + size
    most = max(counts, key=lambda name: counts[name], default="")
    return _FORMATS.get(most)
