"""Activation checkpointing by the layer: what a layer keeps for the gradient, or computes again.

A recomputed layer keeps its input alone, and repeats its forward pass in the backward pass. The
gradients have the same bits; a step in which all layers are recomputed takes about 45 % longer.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from fedllm.packing.precision import as_now

Recompute = bool | Literal["auto"]
"""All layers, none, or as many as what the others keep needs to fit its budget."""

CPU_BUDGET = 448 * 2**20
"""Bytes that the layers of a pass may keep on a CPU; as many as the base has where it has more."""

GPU_SHARE = 0.8
"""Of a GPU's free memory: the part that the layers of a pass may keep."""


class Recomputation:
    """Which layers of a model recompute; none at first."""

    def __init__(self, model: nn.Module, *, cpu_budget: int = CPU_BUDGET) -> None:
        self._model: Any = model
        self._cpu_budget = cpu_budget
        self._now: Recompute = False
        self._budget: _Budget | None = None

    def set(self, recompute: Recompute) -> None:
        """Let the passes from now on recompute all layers, none, or what `auto` finds."""
        if recompute == self._now:
            return
        if recompute == "auto" and not self._model.supports_gradient_checkpointing:
            recompute = False
        if self._now and self._budget is not None:
            self._budget.end()
            self._budget = None
        _switch(self._model, bool(recompute))
        if recompute == "auto":
            self._budget = _Budget(self._model, self._cpu_budget)
        self._now = recompute


class _Budget:
    """Decides in every training pass, when its first layer is through, which others recompute.

    The first layer that keeps something is never recomputed; what it keeps is counted and taken
    for what each of the others would keep.
    """

    def __init__(self, model: nn.Module, cpu_budget: int) -> None:
        self._model = model
        self._cpu_budget = cpu_budget
        self._layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        self._last_recomputed: int | None = None  # None: not yet decided in this pass
        for number, layer in enumerate(self._layers):
            layer.forward = self._deciding(number, layer.forward)

    def end(self) -> None:
        """Leave the layers as they were."""
        for layer in self._layers:
            del layer.forward

    def _deciding(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        layer = self._layers[number]

        def decided(*args: Any, **kwargs: Any) -> Any:
            if not (layer.training and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            if number == 0:
                self._last_recomputed = None
            if self._last_recomputed is not None:
                layer.gradient_checkpointing = number <= self._last_recomputed
                return forward(*args, **kwargs)
            layer.gradient_checkpointing = False
            kept = _Kept(layer)
            with kept.counted():
                output = forward(*args, **kwargs)
            if kept.num_bytes:
                self._last_recomputed = self._decide(number, kept.num_bytes)
            return output

        return decided

    def _decide(self, first: int, num_bytes: int) -> int:
        """Return the last layer to recompute; the backward pass comes to the earlier ones last."""
        others = len(self._layers) - 1 - first
        keeping = max(0, self._bytes() // num_bytes - 1)
        return first + max(0, others - keeping)

    def _bytes(self) -> int:
        device = next(self._model.parameters()).device
        if device.type != "cuda":
            return max(self._cpu_budget, self._weights)
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (free + unused))


class _Kept:
    """Counts the bytes that a layer's forward pass keeps for the gradient, weights left out."""

    def __init__(self, layer: nn.Module) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        self.num_bytes = 0

    def counted(self) -> saved_tensors_hooks:
        """Return the context of the forward pass."""
        return saved_tensors_hooks(self._pack, _unpacked)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        # a tensor with its graph would be a circle that nobody frees where no backward pass follows
        return tensor.detach()


def _unpacked(tensor: Tensor) -> Tensor:
    return tensor


def _switch(model: Any, on: bool) -> None:
    # the methods have had new names since transformers 5.23
    if on:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)(
            {"use_reentrant": False, "context_fn": as_now}
        )
        # re-entrant checkpointing alone needs it; without, nothing below the adapters keeps a graph
        if hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()
    else:
        disable = getattr(model, "activation_checkpointing_disable", None)
        (disable or model.gradient_checkpointing_disable)()
