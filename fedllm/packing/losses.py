"""The loss of packed rows: logits only where a loss is, cross entropy in float32.

Legend: T packed tokens, U positions with logits, K targets, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.errors import ModelError
from fedllm.packing.attention import INPUTS
from fedllm.packing.batches import keeps_logits
from fedllm.packing.sequences import Packed

_CHUNK_LOGITS = 1 << 22  # logits in float32 at one time


def packed_losses(model: nn.Module, packed: Packed, layout: str) -> Tensor:
    """Return the sum of the losses of all targets of all rows, a scalar for training."""
    losses_K = target_losses(model, packed, layout)
    return (losses_K * packed.weights_K).sum()


def target_losses(model: nn.Module, packed: Packed, layout: str) -> Tensor:
    """Return the cross entropy per target (K,), at least in float32."""
    # the gradient of `[0]` would be a copy of the logits' gradient
    logits_UV = forward(model, packed, layout, kept=packed.kept_U).logits.squeeze(0)
    return cross_entropies(logits_UV, packed.inverse_K, packed.targets_K)


def forward(model: nn.Module, packed: Packed, layout: str, *, kept: Tensor, **options: Any) -> Any:
    """Return the model's output for packed rows, with logits (1, U, V) at the indices `kept`.

    `options` go to the model, for example a cache to fill; without one it keeps no cache.

    Raises:
        ModelError: the model does not call the attention function of the layout.
    """
    inputs = INPUTS[layout](model, [packed.parts], packed.computed_tokens, packed.tokens_1T.device)
    keeps = keeps_logits(model)
    output = model(
        input_ids=packed.tokens_1T,
        position_ids=packed.positions_1T,
        **inputs,
        **{"use_cache": False, **options},
        **({"logits_to_keep": kept} if keeps else {}),
    )
    if not keeps:
        output.logits = output.logits[:, kept]
    plan = inputs.get("parts")
    if plan is not None and not plan.calls:
        raise ModelError(
            f"{type(model).__name__}: its attention does not go through transformers' attention "
            f"interface; need another layout of its rows than {layout}"
        )
    return output


def cross_entropies(
    logits_UV: Tensor, inverse_K: Tensor, targets_K: Tensor, *, chunk_logits: int = _CHUNK_LOGITS
) -> Tensor:
    """Return -log softmax of `logits_UV[inverse_K]` at the targets (K,).

    It is computed in float32 (float64 for float64 logits), one chunk of positions after the other,
    so that only a chunk of the logits and of their gradient is in that precision at a time. The
    backward pass writes the gradient over the logits.

    Args:
        logits_UV: logits in any precision.
        inverse_K: the position that each target reads, sorted.
        targets_K: the target tokens.
        chunk_logits: max logits of a chunk; a chunk has at least one position.
    """
    losses_K: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_UV, inverse_K, targets_K, chunk_logits
    )
    return losses_K


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_UV: Tensor, inverse_K: Tensor, targets_K: Tensor, chunk_logits: int
    ) -> Tensor:
        dtype = torch.promote_types(logits_UV.dtype, torch.float32)
        sums_U = torch.empty(logits_UV.shape[0], dtype=dtype, device=logits_UV.device)
        for chunk in _chunks(logits_UV, chunk_logits):
            sums_U[chunk] = logits_UV[chunk].to(dtype).logsumexp(dim=1)
        ctx.save_for_backward(logits_UV, inverse_K, targets_K, sums_U)
        ctx.chunk_logits = chunk_logits
        return sums_U[inverse_K] - logits_UV[inverse_K, targets_K].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_K: Tensor) -> tuple[Tensor, None, None, None]:
        logits_UV, inverse_K, targets_K, sums_U = ctx.saved_tensors
        upstream_U = torch.zeros_like(sums_U).index_add_(0, inverse_K, upstream_K)
        chunks = _chunks(logits_UV, ctx.chunk_logits)
        ends = torch.tensor([chunk.stop for chunk in chunks], device=inverse_K.device)
        first = 0
        for chunk, last in zip(chunks, torch.searchsorted(inverse_K, ends).tolist(), strict=True):
            part = (logits_UV[chunk] - sums_U[chunk, None]).exp_()
            part.mul_(upstream_U[chunk, None])
            places = (inverse_K[first:last] - chunk.start, targets_K[first:last])
            part.index_put_(places, -upstream_K[first:last], accumulate=True)
            # in the place of the logits, which nothing reads any more
            logits_UV[chunk] = part
            first = last
        return logits_UV, None, None, None


def _chunks(logits_UV: Tensor, chunk_logits: int) -> list[slice]:
    num_positions, num_tokens = logits_UV.shape
    size = max(1, chunk_logits // num_tokens)
    starts = range(0, num_positions, size)
    return [slice(start, min(start + size, num_positions)) for start in starts]
