"""Attention among the parts of packed sequences, per layout.

`parts` computes each part alone, by an attention function that is registered with transformers: no
mask of all tokens times all tokens exists. `mask` gives the model that mask. `flex` gives it a
block mask for FlexAttention. `packed` gives it only positions that restart, by which transformers
separates parts without a prefix.

Legend: C batch entries, H heads, T packed tokens, S tokens of a part, P tokens of its prefix, D
features per head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fedllm.errors import ModelError
from fedllm.packing.gated_mlp import is_large
from fedllm.packing.sequences import Packed, Part, padded_to

Entries = Sequence[Sequence[Part]]
"""The parts of each batch entry; they cover its tokens, in order."""

PARTS_ATTENTION = "fedllm_parts"
"""The name of `parts_attention` in `set_attn_implementation`."""

FLEX_BLOCK = 128
"""Tokens of a block: a packed sequence for `flex` has a multiple of them."""


class PartsPlan:
    """The parts of one forward pass and their masks; all attention layers share them.

    Batch entries are joined to one sequence, so that parts have indices in it.
    """

    def __init__(self, entries: Entries, num_tokens: int, device: torch.device | str) -> None:
        self.calls = 0
        self._device = device
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._parts = [part for parts in entries for part in parts]
        self._longest = dict.fromkeys((part.offset for part in self._parts), 0)
        for part in self._parts:
            self._longest[part.offset] = max(self._longest[part.offset], part.length)
        self.lengths = [part.length for part in self._parts]
        assert self.num_tokens == len(entries) * num_tokens, "parts cover every token"
        self.prefixes: list[int | None] = []  # per part: the number of its prefix
        for parts in entries:
            numbers = {
                (part.start, part.stop): len(self.prefixes) + n for n, part in enumerate(parts)
            }
            self.prefixes += [
                numbers[part.prefix_start, part.prefix_stop] if part.offset else None
                for part in parts
            ]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all entries."""
        return sum(self.lengths)

    def mask(self, number: int, window: int | None) -> Tensor | None:
        """Return the keys, prefix and own, that a part's queries see (S, P+S); None: causal."""
        part = self._parts[number]
        if window is not None and window >= part.offset + part.length:
            window = None
        if window is None and not part.offset:
            return None
        big_SX = self._masks.get((part.offset, window))
        if big_SX is None:
            # a key's index is its position: each part uses the top left corner of one mask
            big_SX = _causal(part.offset, self._longest[part.offset], window, self._device)
            self._masks[part.offset, window] = big_SX
        return big_SX[: part.length, : part.offset + part.length]


def _causal(offset: int, length: int, window: int | None, device: torch.device | str) -> Tensor:
    query_S1 = torch.arange(offset, offset + length, device=device).unsqueeze(1)
    key_1X = torch.arange(offset + length, device=device).unsqueeze(0)
    seen_SX = key_1X <= query_S1
    return seen_SX if window is None else seen_SX & (key_1X > query_S1 - window)


def parts_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    parts: PartsPlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention part by part; without `parts`, as transformers' SDPA, with its bits.

    Args:
        module: the attention layer.
        query: (C, H, T, D).
        key: (C, H or fewer, T, D).
        value: as `key`.
        attention_mask: used without `parts` only.
        parts: the parts of this pass; the model hands them on from its call.
        sliding_window: how many positions a token sees, up to its own and included.
        softcap: refused with `parts`, since SDPA cannot apply it.
        s_aux: likewise.
        position_bias: likewise.
        scaling: factor of the scores; None: 1 / sqrt(D).
        dropout: rate for the attention weights.
        **kwargs: for transformers' own function.

    Returns:
        (C, T, H, D) and no weights.

    Raises:
        ModelError: the layer adds a term to its scores, and `parts` is given.
    """
    extra = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
    given = {name: term for name, term in extra.items() if term is not None}
    if parts is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **given,
            **kwargs,
        )
        return result
    if given:
        raise ModelError(
            f"{type(module).__name__}: its attention adds {', '.join(given)} to the scores; rows "
            f"that share a prefix cannot be computed part by part"
        )
    parts.calls += 1
    num_entries, _, num_tokens, _ = query.shape
    settings = (parts, sliding_window, scaling, dropout)
    if dropout or not torch.is_grad_enabled() or not is_large(query):
        output_1THD = _attended(query, key, value, *settings)
    else:
        output_1THD = _Attended.apply(query, key, value, *settings)  # type: ignore[no-untyped-call]
    return output_1THD.view(num_entries, num_tokens, *output_1THD.shape[2:]), None


class _Attended(torch.autograd.Function):
    """Attention that saves queries, keys and values, but not the copies that parts need."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.settings = settings
        return _attended(query, key, value, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1THD: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            x.detach().requires_grad_(needed)
            for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            output_1THD = _attended(*inputs, *ctx.settings)
        trained = [x for x in inputs if x.requires_grad]
        computed = iter(torch.autograd.grad(output_1THD, trained, grad_1THD))
        grads = [next(computed) if x.requires_grad else None for x in inputs]
        return *grads, *(None for _ in ctx.settings)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: PartsPlan,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Return the attention output of all parts (1, C * T, H, D)."""
    groups = query.shape[1] // key.shape[1]
    queries = _split(query, parts, 1)
    keys, values = _split(key, parts, groups), _split(value, parts, groups)
    outputs = []
    for number, prefix in enumerate(parts.prefixes):
        key_1HXD, value_1HXD = keys[number], values[number]
        if prefix is not None:
            key_1HXD = torch.cat([keys[prefix], key_1HXD], dim=2)
            value_1HXD = torch.cat([values[prefix], value_1HXD], dim=2)
        seen_SX = parts.mask(number, window)
        output_1HSD = nn.functional.scaled_dot_product_attention(
            queries[number],
            key_1HXD,
            value_1HXD,
            attn_mask=seen_SX,
            is_causal=seen_SX is None,
            scale=scaling,
            dropout_p=dropout,
        )
        outputs.append(output_1HSD.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _split(x_CHTD: Tensor, parts: PartsPlan, copies: int) -> tuple[Tensor, ...]:
    """Return the tensors of all parts (1, H * copies, S, D), entry after entry.

    `split` and not slices: its gradient is written once, not once per part.
    """
    if copies > 1:
        x_CHTD = x_CHTD.repeat_interleave(copies, dim=1)
    if x_CHTD.shape[0] > 1:
        x_CHTD = x_CHTD.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)
    return torch.split(x_CHTD, parts.lengths, dim=2)


AttentionInterface.register(PARTS_ATTENTION, parts_attention)
# without a mask function an implementation gets no padding mask at all
AttentionMaskInterface.register(PARTS_ATTENTION, sdpa_mask)


def boolean_mask(
    parts: Sequence[Part], num_tokens: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the keys that each query sees, bool (1, 1, T, T)."""
    seen_TT = torch.zeros(num_tokens, num_tokens, dtype=torch.bool, device=device)
    for part in parts:
        own = slice(part.start, part.stop)
        seen_TT[own, own] = True
        seen_TT[own, part.prefix_start : part.prefix_stop] = True
    return seen_TT.tril_()[None, None]


def block_mask(entries: Entries, num_tokens: int, device: torch.device | str) -> BlockMask:
    """Return the block mask of FlexAttention: keys that each query sees, (C, 1, T, T)."""
    assert num_tokens % FLEX_BLOCK == 0, f"{num_tokens} tokens: no multiple of {FLEX_BLOCK}"

    def per_token(end: str) -> Tensor:
        values = [
            value for parts in entries for p in parts for value in [getattr(p, end)] * p.length
        ]
        return torch.tensor(values).view(len(entries), num_tokens).to(device)

    starts_CT, prefix_starts_CT, prefix_stops_CT = map(
        per_token, ("start", "prefix_start", "prefix_stop")
    )

    def sees(entry: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key <= query) & (key >= starts_CT[entry, query])
        behind = key >= prefix_starts_CT[entry, query]
        return own | (behind & (key < prefix_stops_CT[entry, query]))

    return create_block_mask(
        sees, B=len(entries), H=None, Q_LEN=num_tokens, KV_LEN=num_tokens, device=str(device)
    )


SHARED = frozenset({"parts", "flex", "mask"})
"""The layouts that compute the common prefix of rows once."""


def fitted(packed: Packed, layout: str) -> Packed:
    """Return packed rows as a layout needs them: filled up to whole blocks for `flex`."""
    block = FLEX_BLOCK if layout == "flex" else 1
    return padded_to(packed, -(-packed.computed_tokens // block) * block)


Inputs = Callable[[nn.Module, Entries, int, torch.device], dict[str, Any]]


def _parts_inputs(
    _model: nn.Module, entries: Entries, num_tokens: int, device: torch.device
) -> dict[str, Any]:
    # transformers hands on a mask of four dimensions unchanged and makes none itself
    unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {"attention_mask": unused, "parts": PartsPlan(entries, num_tokens, device)}


def _mask_inputs(
    model: nn.Module, entries: Entries, num_tokens: int, device: torch.device
) -> dict[str, Any]:
    seen_C1TT = torch.cat([boolean_mask(parts, num_tokens, device) for parts in entries])
    config: Any = model.config
    if config._attn_implementation != "eager":
        return {"attention_mask": seen_C1TT}
    dtype = next(model.parameters()).dtype  # eager attention adds the mask to its scores
    added_C1TT = torch.zeros(seen_C1TT.shape, dtype=dtype, device=device)
    return {"attention_mask": added_C1TT.masked_fill_(~seen_C1TT, torch.finfo(dtype).min)}


def _flex_inputs(
    _model: nn.Module, entries: Entries, num_tokens: int, device: torch.device
) -> dict[str, Any]:
    return {"attention_mask": block_mask(entries, num_tokens, device)}


def _packed_inputs(
    _model: nn.Module, entries: Entries, _num_tokens: int, _device: torch.device
) -> dict[str, Any]:
    assert not any(part.offset for parts in entries for part in parts), "a prefix would be lost"
    return {"attention_mask": None}


INPUTS: Mapping[str, Inputs] = {
    "parts": _parts_inputs,
    "mask": _mask_inputs,
    "flex": _flex_inputs,
    "packed": _packed_inputs,
}
"""The inputs of a model per layout, beside tokens and positions, for attention in the parts."""
