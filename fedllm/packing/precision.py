"""The number formats of a forward pass: what is rounded to bfloat16, and what stays in float32.

A small adapter changes a layer's output by less than the last place of a bfloat16 number, so its
change is lost if the sum is rounded to bfloat16. Therefore A, B, the scale and the sum with the
layer's output are float32, and so is all that is computed from it, up to the next product with a
weight:

    model.dtype  training.precision  products of linear layers                     the rest
    float32      float32             float32                                       float32
    float32      bfloat16            bfloat16, a layer's weights rounded at use    float32
    bfloat16     bfloat16            bfloat16                                      float32
    bfloat16     float32             float32, a layer's weights widened at use     float32

The weight of a quantised layer is computed in float32 from its bits, and rounded at use for a
product in bfloat16.

"The rest" has two exceptions. Logits have the format of the product. Layers of a bfloat16 base
that hold matrices and are neither linear nor embeddings (fused experts, convolutions) compute in
bfloat16. On a GPU, bfloat16 is torch's autocast, which computes attention in bfloat16 too, since
its kernels are made for that.

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

from fedllm.model.quantised import Int8Linear, Nf4Linear, QuantisedLinear

# whether linear layers of the base compute in bfloat16
_BFLOAT16_PRODUCTS = ContextVar("_BFLOAT16_PRODUCTS", default=False)


def precision(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context for forward passes in a precision of `training.precision`."""
    if name == "float32":
        return nullcontext()
    if device.type != "cpu":
        return torch.autocast(device.type, torch.bfloat16)
    # autocast would round attention too: its values are the sums of v_proj and its adapter
    return bfloat16_products()


@contextmanager
def bfloat16_products(on: bool = True) -> Iterator[None]:
    """Compute linear layers of the base in bfloat16 inside the block, on any device."""
    token = _BFLOAT16_PRODUCTS.set(on)
    try:
        yield
    finally:
        _BFLOAT16_PRODUCTS.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a forward pass and for its repetition by gradient checkpointing.

    The repetition is part of the backward pass, so it is outside the forward pass's context.
    """
    return nullcontext(), bfloat16_products(_BFLOAT16_PRODUCTS.get())


def in_float32(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that switches autocast off."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def keep_sums_in_float32(model: nn.Module) -> None:
    """Change a base's layers so that it computes as the table says, in both precisions.

    The vectors of norms of a bfloat16 base become float32, which changes no value. Biases of
    linear layers and all matrices stay as they are.
    """
    causal: Any = model
    layers: list[Any] = list(model.modules())
    for module in layers:
        own = list(module.parameters(recurse=False))
        if type(module) in _BASE_LAYERS:
            module.__class__ = _BASE_LAYERS[type(module)]
        elif all(parameter.dtype != torch.bfloat16 for parameter in own):
            continue
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(_float32_output)
        elif any(parameter.ndim > 1 for parameter in own):
            module.register_forward_pre_hook(_bfloat16_inputs, with_kwargs=True)
            module.register_forward_hook(_float32_output)
        else:
            for parameter in own:
                parameter.data = parameter.data.float()
    head = causal.get_output_embeddings()
    if type(head) in _BASE_LAYERS.values():
        head.returns_float32 = False  # logits are large: the loss converts them by the chunk


class Factor(nn.Linear):
    """A or B of an adapter: its product is in float32, in any format of the base."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of `x` with the factor."""
        with in_float32(x.device):
            return super().forward(x)


def make_float32_factor(factor: nn.Module) -> None:
    """Turn a layer that PEFT made for A or B into a `Factor` in float32."""
    factor.float().__class__ = Factor


class _BaseLinear(nn.Linear):
    """A linear layer of a frozen base."""

    returns_float32 = True

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x, self.weight, super().forward)


class _BaseConv1D(Conv1D):  # type: ignore[misc]  # transformers has no types
    """A linear layer of a frozen base whose weight is stored (I, O)."""

    returns_float32 = True

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x, self.weight.t(), super().forward)


class _BaseInBits:
    """A quantised linear layer of a frozen base; beside its class in `model.quantised`."""

    returns_float32 = True

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        is_bfloat16 = _BFLOAT16_PRODUCTS.get() or torch.is_autocast_enabled(x.device.type)
        with in_float32(x.device):
            product: Tensor = _BitsProduct.apply(  # type: ignore[no-untyped-call]
                x, layer, torch.bfloat16 if is_bfloat16 else torch.float32
            )
            if layer.bias is not None:
                product = product + layer.bias.to(product.dtype)
        return product.float()


class _BaseNf4Linear(_BaseInBits, Nf4Linear):
    """A linear layer of a frozen base in 4 bits."""


class _BaseInt8Linear(_BaseInBits, Int8Linear):
    """A linear layer of a frozen base in 8 bits."""


_BASE_LAYERS: dict[type, type] = {
    nn.Linear: _BaseLinear,
    Conv1D: _BaseConv1D,
    Nf4Linear: _BaseNf4Linear,
    Int8Linear: _BaseInt8Linear,
}


def _product(layer: Any, x: Tensor, weight_OI: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a layer's output in the current precision; `own` is the forward of its class."""
    if _BFLOAT16_PRODUCTS.get():
        bias_O = None if layer.bias is None else layer.bias.bfloat16()
        output = nn.functional.linear(x.bfloat16(), weight_OI.bfloat16(), bias_O)
        return output.float() if layer.returns_float32 else output
    if torch.is_autocast_enabled(x.device.type):
        output = own(x)
        return output.float() if layer.returns_float32 else output
    if x.dtype == weight_OI.dtype:
        return own(x)
    product: Tensor = _Float32Product.apply(x, weight_OI)  # type: ignore[no-untyped-call]
    return product if layer.bias is None else product + layer.bias


class _Float32Product(torch.autograd.Function):
    """Product x W^T in float32 with a frozen W; no float32 copy of W is saved for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        return nn.functional.linear(x.float(), weight_OI.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight_OI,) = ctx.saved_tensors
        return grad @ weight_OI.float(), None


class _BitsProduct(torch.autograd.Function):
    """Product x W^T with the W that a layer's bits stand for; no W is saved for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype, ctx.of = layer, dtype, x.dtype
        return nn.functional.linear(x.to(dtype), layer.whole_weight().to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight_OI = ctx.layer.whole_weight().to(ctx.dtype)
        return (grad.to(ctx.dtype) @ weight_OI).to(ctx.of), None, None


def _float32_output(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_as_float32, output))
    return _as_float32(output)


def _as_float32(value: Any) -> Any:
    is_bfloat16 = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if is_bfloat16 else value


def _bfloat16_inputs(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG001
    named = {name: _as_bfloat16(value) for name, value in kwargs.items()}
    return tuple(map(_as_bfloat16, args)), named


def _as_bfloat16(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.bfloat16() if is_float else value
