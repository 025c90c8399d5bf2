"""Linear layers of a frozen base in 8 or 4 bits, quantised when the base is loaded (QLoRA).

Adapters, their sums and all other weights stay as they are: a layer's weight is computed from its
bits where the layer uses it, in the forward and again in the backward pass. The bits are those of
bitsandbytes, and nothing else of that package is used.

Legend: O out, I in.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedllm.errors import ConfigError
from fedllm.model.targets import adaptable_modules

PACKAGE = "bitsandbytes"
_BLOCK = 64  # weights that share a scale in 4 bits


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is kept in few bits.

    Attributes:
        weight: the bits, whole numbers in the shape that bitsandbytes gives them.
        is_conv1d: whether it replaces a layer that stores its weight as (I, O).
    """

    def __init__(self, layer: nn.Module, weight_OI: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_OI.shape
        self.is_conv1d = isinstance(layer, Conv1D)
        own_bias: Any = layer.bias
        self.bias = own_bias
        self.weight = nn.Parameter(self._quantise(weight_OI), requires_grad=False)

    def _quantise(self, weight_OI: Tensor) -> Tensor:
        """Return the bits of a float32 weight, and keep their scales."""
        raise NotImplementedError

    def whole_weight(self) -> Tensor:
        """Return the weight that the bits stand for, (O, I) in float32."""
        raise NotImplementedError


class Nf4Linear(QuantisedLinear):
    """A linear layer in 4-bit NormalFloat with doubly quantised scales.

    Source: QLoRA (arXiv 2305.14314), section 3, with blocks of 64 and 256.
    """

    def _quantise(self, weight_OI: Tensor) -> Tensor:
        flat = weight_OI.reshape(-1)
        # in rows of a block each: bitsandbytes 0.50 on CPUs gives wrong weights for other rows
        blocks = nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
        bits, self._state = _functional().quantize_4bit(
            blocks, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        packed: Tensor = bits
        return packed

    def whole_weight(self) -> Tensor:
        """Return the weight that the bits stand for, (O, I) in float32."""
        blocks: Tensor = _functional().dequantize_4bit(self.weight.data, self._state)
        size = self.out_features * self.in_features
        return blocks.view(-1)[:size].view(self.out_features, self.in_features)


class Int8Linear(QuantisedLinear):
    """A linear layer in whole numbers of 8 bits with a scale for each row; inputs stay as they are.

    Source: the row-wise scales of LLM.int8() (arXiv 2208.07339), section 2.
    """

    def _quantise(self, weight_OI: Tensor) -> Tensor:
        bits, scales, _ = _functional().int8_vectorwise_quant(weight_OI.to(torch.float16))
        self._scales_O1 = scales.float().unsqueeze(1) / 127
        packed: Tensor = bits
        return packed

    def whole_weight(self) -> Tensor:
        """Return the weight that the bits stand for, (O, I) in float32."""
        weight: Tensor = self.weight.data.float() * self._scales_O1
        return weight


KINDS: Mapping[str, Callable[[nn.Module, Tensor], QuantisedLinear]] = {
    "nf4": Nf4Linear,
    "int8": Int8Linear,
}
"""The layers by the value of `model.quantization`; `none` has no entry."""


def require_quantiser(kind: str) -> None:
    """Raise ConfigError if what quantises a base is not installed here."""
    if kind in KINDS and find_spec(PACKAGE) is None:
        raise ConfigError(
            f"model.quantization: {kind} needs {PACKAGE}, which is not installed here; "
            "pip install 'fedllm[quantization]', or model.quantization: none"
        )


def quantise(model: nn.Module, kind: str, device: str | torch.device) -> None:
    """Replace the linear layers of a model, but for the output head, by layers in few bits.

    Args:
        model: its weights may be mapped from files; one after the other is read.
        kind: a key of `KINDS`.
        device: where the bits are.
    """
    require_quantiser(kind)
    for path in adaptable_modules(model):
        layer: Any = model.get_submodule(path)
        weight = layer.weight.data.to(device, torch.float32)
        _replace(
            model, path, KINDS[kind](layer, weight.t() if isinstance(layer, Conv1D) else weight)
        )


def dequantise(model: nn.Module) -> None:
    """Replace layers in few bits by ordinary ones in float32, with the weights they stand for."""
    for path, layer in list(quantised_layers(model)):
        weight_OI = layer.whole_weight()
        if layer.is_conv1d:
            whole: Any = Conv1D(layer.out_features, layer.in_features)
            whole.weight.data = weight_OI.t().contiguous()
        else:
            with torch.device("meta"):
                whole = nn.Linear(layer.in_features, layer.out_features, bias=False)
            whole.weight = nn.Parameter(weight_OI, requires_grad=False)
        whole.bias = layer.bias
        _replace(model, path, whole)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, QuantisedLinear]]:
    """Yield the layers of a model that are in few bits, by path."""
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            yield path, module


def quantisation_text(kind: str) -> str:
    """Return what the bits of a quantised base depend on."""
    return f"{kind} of {PACKAGE} {version(PACKAGE)}"


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer.train(model.training))


@contextmanager
def absent(package: str) -> Iterator[None]:
    """Let nobody find a package in the block, unless it is imported already.

    Other packages would import it where they find it, or fetch files with it.
    """
    if sys.modules.get(package) is not None:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@cache
def _functional() -> Any:
    """Return the functions of bitsandbytes, which it takes seconds to import."""
    # it says which kernels it lacks, and would fetch them from a hub
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    with absent("kernels"):
        from bitsandbytes import functional

    return functional
