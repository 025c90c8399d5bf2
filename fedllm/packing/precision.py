"""The number formats of a forward pass: what is rounded to bfloat16, and what stays in float32.

A small adapter changes a layer's output by less than the last place of a bfloat16 number, so a sum
that is rounded at once loses it. Therefore A, B, scale and their sum into the layer's output are
float32, and so is what is computed with it, up to the next product with a weight:

    model.dtype  training.precision  products of linear layers                     the rest
    float32      float32             float32                                       float32
    float32      bfloat16            bfloat16, a layer's weights rounded at use    float32
    bfloat16     bfloat16            bfloat16                                      float32
    bfloat16     float32             float32, a layer's weights widened at use     float32

Two things are not as "the rest" says: logits come in the format of the product, and layers of a
bfloat16 base that hold matrices and are neither linear nor embeddings (fused experts,
convolutions) compute in bfloat16. On a GPU bfloat16 is torch's autocast, which computes attention
in bfloat16 as well: its kernels are made for that.

Legend: O out, I in.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

_NARROW = ContextVar("_NARROW", default=False)  # whether linear layers compute in bfloat16


def precision(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of forward passes in the precision that `training.precision` names."""
    if name == "float32":
        return nullcontext()
    if device.type != "cpu":
        return torch.autocast(device.type, torch.bfloat16)
    # autocast would round attention too, whose values are the sums of v_proj and its adapter
    return narrow_products()


@contextmanager
def narrow_products(on: bool = True) -> Iterator[None]:
    """Let linear layers of the base compute in bfloat16 in the block, on any device."""
    token = _NARROW.set(on)
    try:
        yield
    finally:
        _NARROW.reset(token)


def as_now() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a forward pass and its repetition by gradient checkpointing.

    The repetition is part of the backward pass, outside the context of the forward pass.
    """
    return nullcontext(), narrow_products(_NARROW.get())


def in_float32(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast, where it is on, rounds nothing."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def keep_sums_wide(model: nn.Module) -> None:
    """Let a base compute as the table says, in either precision.

    Vectors of a bfloat16 base (of norms; biases of linear layers stay) become float32, which
    changes no value. Matrices stay as they are.
    """
    causal: Any = model
    layers: list[Any] = list(model.modules())
    for module in layers:
        own = list(module.parameters(recurse=False))
        if type(module) in _OF_BASE:
            module.__class__ = _OF_BASE[type(module)]
        elif all(parameter.dtype != torch.bfloat16 for parameter in own):
            continue
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(_wide_output)
        elif any(parameter.ndim > 1 for parameter in own):
            module.register_forward_pre_hook(_narrow_inputs, with_kwargs=True)
            module.register_forward_hook(_wide_output)
        else:
            for parameter in own:
                parameter.data = parameter.data.float()
    head = causal.get_output_embeddings()
    if type(head) in _OF_BASE.values():
        head.hands_on_wide = False  # logits are large, and the loss widens them by the chunk


class Factor(nn.Linear):
    """A or B of an adapter: its product is in float32, whatever the base's are in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with the factor."""
        with in_float32(x.device):
            return super().forward(x)


def keep_factor_wide(factor: nn.Module) -> None:
    """Make a layer that PEFT made for A or B a `Factor` in float32."""
    factor.float().__class__ = Factor


class _LinearOfBase(nn.Linear):
    """A linear layer of a frozen base."""

    hands_on_wide = True

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x, self.weight, super().forward)


class _Conv1DOfBase(Conv1D):  # type: ignore[misc]  # transformers has no types
    """The same with its weight stored (I, O)."""

    hands_on_wide = True

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x, self.weight.t(), super().forward)


_OF_BASE: dict[type, type] = {nn.Linear: _LinearOfBase, Conv1D: _Conv1DOfBase}


def _product(layer: Any, x: Tensor, weight_OI: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a layer computes in the present precision; `own` is its class's way."""
    if _NARROW.get():
        bias_O = None if layer.bias is None else layer.bias.bfloat16()
        output = nn.functional.linear(x.bfloat16(), weight_OI.bfloat16(), bias_O)
        return output.float() if layer.hands_on_wide else output
    if torch.is_autocast_enabled(x.device.type):
        output = own(x)
        return output.float() if layer.hands_on_wide else output
    if x.dtype == weight_OI.dtype:
        return own(x)
    product: Tensor = _WideProduct.apply(x, weight_OI)  # type: ignore[no-untyped-call]
    return product if layer.bias is None else product + layer.bias


class _WideProduct(torch.autograd.Function):
    """x W^T in float32 with a frozen W, of which no wide copy is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return nn.functional.linear(x.float(), weight_OI.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight_OI,) = ctx.saved_tensors
        return grad @ weight_OI.float(), None


def _wide_output(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_widened, output))
    return _widened(output)


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if narrow else value


def _narrow_inputs(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG001
    return tuple(map(_narrowed, args)), {name: _narrowed(value) for name, value in kwargs.items()}


def _narrowed(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.bfloat16() if floating else value
