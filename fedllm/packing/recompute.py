"""Activation checkpointing by the layer: a layer saves tensors for the gradient or recomputes them.

A recomputed layer saves only its input, and repeats its forward pass in the backward pass. The
gradients have the same bits. A step that recomputes all layers takes about 45 % longer.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from fedllm.model.memory import give_back_freed
from fedllm.packing.precision import checkpoint_contexts

Recompute = bool | Literal["auto"]
"""All layers, none, or as many as needed so that the others' saved tensors fit a budget."""

CPU_BUDGET = 192 * 2**20
"""Bytes that the layers of a pass may save on a CPU; the size of the base if that is more."""

_TRIM_EVERY = 8  # layers of a pass that recomputes some: about a second of work

GPU_SHARE = 0.8
"""Share of a GPU's free memory that the layers of a pass may fill."""


class Recomputation:
    """Switch for the layers of a model that recompute; at first none does."""

    def __init__(self, model: nn.Module, *, cpu_budget: int = CPU_BUDGET) -> None:
        self._model: Any = model
        self._cpu_budget = cpu_budget
        self._now: Recompute = False
        self._budget: _Budget | None = None

    def set(self, recompute: Recompute) -> None:
        """Set which layers later passes recompute: all, none, or what `auto` finds."""
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
    """A budget for saved tensors: decides in every training pass which layers recompute.

    The decision follows the first layer that saves something, which is never recomputed. Each
    other layer is assumed to save as many bytes.
    """

    def __init__(self, model: nn.Module, cpu_budget: int) -> None:
        self._model = model
        self._cpu_budget = cpu_budget
        self._layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        self._last_recomputed: int | None = None  # None: not yet decided in this pass
        self._first_saving = 0
        last = len(self._layers) - 1
        self._trimming = {last, *range(_TRIM_EVERY - 1, last, _TRIM_EVERY)}
        for number, layer in enumerate(self._layers):
            layer.forward = self._deciding(number, layer.forward)

    def end(self) -> None:
        """Restore the layers."""
        for layer in self._layers:
            del layer.forward

    @property
    def _recomputes(self) -> bool:
        """Whether this pass recomputes a layer: its saved tensors exceed the budget."""
        return self._last_recomputed is not None and self._last_recomputed > self._first_saving

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _deciding(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        layer = self._layers[number]

        def decided(*args: Any, **kwargs: Any) -> Any:
            if not (layer.training and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            if number == 0:
                self._last_recomputed = None
            if self._last_recomputed is not None:
                layer.gradient_checkpointing = number <= self._last_recomputed
                output = forward(*args, **kwargs)
                if self._recomputes and number in self._trimming and self._device.type == "cpu":
                    # holes between the saved tensors are too small for the next layers and logits
                    give_back_freed()
                return output
            layer.gradient_checkpointing = False
            saved = _SavedBytes(layer)
            with saved.counting():
                output = forward(*args, **kwargs)
            if saved.num_bytes:
                self._first_saving = number
                self._last_recomputed = self._decide(number, saved.num_bytes)
            return output

        return decided

    def _decide(self, first: int, num_bytes: int) -> int:
        """Return the last layer to recompute: the backward pass reaches the earlier layers last."""
        others = len(self._layers) - 1 - first
        saving = max(0, self._bytes() // num_bytes - 1)
        return first + max(0, others - saving)

    def _bytes(self) -> int:
        device = self._device
        if device.type != "cuda":
            return max(self._cpu_budget, self._weights)
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (free + unused))


class _SavedBytes:
    """Counter of the bytes that a layer's forward pass saves for the gradient, without weights."""

    def __init__(self, layer: nn.Module) -> None:
        self._seen = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        self.num_bytes = 0

    def counting(self) -> saved_tensors_hooks:
        """Return the context in which the forward pass is counted."""
        return saved_tensors_hooks(self._pack, _unpacked)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        # with its graph the tensor would be in a cycle that is not freed without a backward pass
        return tensor.detach()


def _unpacked(tensor: Tensor) -> Tensor:
    return tensor


def _switch(model: Any, on: bool) -> None:
    # transformers 5.23 renamed the methods
    if on:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)(
            {"use_reentrant": False, "context_fn": checkpoint_contexts}
        )
        # only re-entrant checkpointing needs this hook; it gives layers below the adapters a graph
        if hasattr(model, "_require_grads_hook"):
            model.disable_input_require_grads()
    else:
        disable = getattr(model, "activation_checkpointing_disable", None)
        (disable or model.gradient_checkpointing_disable)()
