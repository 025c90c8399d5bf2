"""Attention by parts gives the result of the dense mask, without that mask."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedllm.errors import ModelError
from fedllm.packing.attention import (
    FLEX_BLOCK,
    PartsPlan,
    block_mask,
    boolean_mask,
    parts_attention,
)
from fedllm.packing.gated_mlp import is_large
from fedllm.packing.sequences import PADDING, Part


class Layer(nn.Module):
    """A stand-in for an attention layer, with the attributes that the functions read."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def lay(lengths: list[tuple[int, list[int]]]) -> tuple[Part, ...]:
    """Return the parts of groups, each with a prefix and its rows."""
    parts: list[Part] = []
    end = row = 0
    for prefix, owns in lengths:
        begin, end = end, end + prefix
        if prefix:
            parts.append(Part(start=begin, stop=end))
        ends = {"prefix_start": begin, "prefix_stop": end} if prefix else {}
        for own in owns:
            parts.append(Part(start=end, stop=end + own, row=row, **ends))
            end += own
            row += 1
    return tuple(parts)


GROUPS = st.lists(
    st.tuples(st.integers(0, 7), st.lists(st.integers(1, 6), min_size=1, max_size=4)),
    min_size=1,
    max_size=3,
)


def total(parts: tuple[Part, ...]) -> int:
    return parts[-1].stop


def heads(parts: tuple[Part, ...], seed: int, *, key_heads: int = 2, size: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, h, total(parts), size, dtype=torch.float64, generator=draw).requires_grad_()
        for h in (4, key_heads, key_heads)
    ]


def attended(
    qkv: list[Tensor],
    plan: PartsPlan | None,
    *,
    groups: int = 2,
    mask: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    query, key, value = qkv
    return parts_attention(Layer(groups), query, key, value, mask, parts=plan, **given)


def dense(parts: tuple[Part, ...], qkv: list[Tensor], window: int | None) -> Tensor:
    """Return the attention by its definition: positions, owners, a softmax."""
    where = [(n, part.offset + j) for n, part in enumerate(parts) for j in range(part.length)]
    prefix_of = {
        n: next((m for m, p in enumerate(parts) if part.offset and p.start == part.prefix_start), n)
        for n, part in enumerate(parts)
    }
    rows = []
    for owner, position in where:
        rows.append([
            (other == owner or other == prefix_of[owner])
            and at <= position
            and (window is None or at > position - window)
            for other, at in where
        ])  # fmt: skip
    query, key, value = qkv
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) / 8**0.5).masked_fill(~torch.tensor(rows), -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def grads(output: Tensor, qkv: list[Tensor]) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(7)
    weight = torch.randn(output.shape, dtype=output.dtype, generator=draw)
    return torch.autograd.grad((output * weight).sum(), qkv)


@given(GROUPS, st.none() | st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_parts_attend_by_the_definition(
    groups: list[tuple[int, list[int]]], window: int | None, key_heads: int
) -> None:
    parts = lay(groups)
    qkv = heads(parts, 0, key_heads=key_heads)
    plan = PartsPlan([parts], total(parts), "cpu")
    found, _ = attended(qkv, plan, groups=4 // key_heads, sliding_window=window)
    expected = dense(parts, qkv, window)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(grads(found, qkv), grads(expected, qkv), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert plan.calls == 1


@given(GROUPS)
def test_the_dense_mask_is_the_definition(groups: list[tuple[int, list[int]]]) -> None:
    parts = lay(groups)
    query, key, value = heads(parts, 1, key_heads=4)
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=boolean_mask(parts, total(parts))
    )
    expected = dense(parts, [query, key, value], None)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-10, atol=1e-10)


@given(st.lists(GROUPS, min_size=2, max_size=3))
def test_batch_entries_attend_as_if_alone(entries: list[list[tuple[int, list[int]]]]) -> None:
    alone = [lay(groups) for groups in entries]
    longest = max(map(total, alone))
    padded = [
        (
            *parts,
            *([Part(start=total(parts), stop=longest, row=PADDING)] * (total(parts) < longest)),
        )
        for parts in alone
    ]
    inputs = [heads(parts, n) for n, parts in enumerate(alone)]
    batch = [
        torch.cat([nn.functional.pad(x, (0, 0, 0, longest - x.shape[2])) for x in xs])
        for xs in zip(*inputs, strict=True)
    ]
    found, _ = attended(batch, PartsPlan(padded, longest, "cpu"))
    for n, (parts, qkv) in enumerate(zip(alone, inputs, strict=True)):
        plan = PartsPlan([parts], total(parts), "cpu")
        expected, _ = attended(qkv, plan)
        torch.testing.assert_close(found[n, : total(parts)], expected[0], rtol=1e-12, atol=1e-12)


def test_no_copies_of_keys_and_values_are_kept_for_the_gradient() -> None:
    parts = lay([(500, [200, 224, 100])])
    qkv = [x.requires_grad_() for x in heads(parts, 0, size=64)]
    assert is_large(qkv[0])
    plan = PartsPlan([parts], total(parts), "cpu")
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = attended(qkv, plan)[0]
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in qkv}
    frozen = [qkv[0], *(x.detach() for x in qkv[1:])]
    alone = attended(frozen, plan)[0]
    assert torch.equal(alone, output)
    upstream = torch.randn(output.shape)
    assert torch.equal(
        torch.autograd.grad(alone, qkv[0], upstream)[0],
        torch.autograd.grad(output, qkv[0], upstream)[0],
    )


def test_without_parts_it_is_the_attention_of_transformers() -> None:
    qkv = heads(lay([(0, [9])]), 0)
    mask = boolean_mask(lay([(4, [2, 3])]), 9)
    for given_mask in (None, mask):
        found, _ = attended(qkv, None, mask=given_mask, scaling=0.3)
        expected, _ = sdpa_attention_forward(Layer(2), *qkv, given_mask, scaling=0.3)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("term", ["softcap", "s_aux", "position_bias"])
def test_terms_that_cannot_be_added_are_refused(term: str) -> None:
    parts = lay([(4, [2, 3])])
    plan = PartsPlan([parts], 9, "cpu")
    given: dict[str, Any] = {term: 30.0 if term == "softcap" else torch.zeros(4)}
    with pytest.raises(ModelError, match=f"its attention adds {term} to the scores"):
        attended(heads(parts, 0), plan, **given)


@given(GROUPS, GROUPS)
def test_blocks_are_those_of_the_dense_mask(
    first: list[tuple[int, list[int]]], second: list[tuple[int, list[int]]]
) -> None:
    scaled = [
        [(9 * prefix, [17 * own for own in owns]) for prefix, owns in groups]
        for groups in (first, second)
    ]
    alone = [lay(groups) for groups in scaled]
    longest = -(-max(map(total, alone)) // FLEX_BLOCK) * FLEX_BLOCK
    entries = [
        (
            *parts,
            *([Part(start=total(parts), stop=longest, row=PADDING)] * (total(parts) < longest)),
        )
        for parts in alone
    ]
    blocks = block_mask(entries, longest, "cpu")
    assert blocks.shape == (2, 1, longest, longest)
    entry, zero = torch.arange(2)[:, None, None], torch.zeros((), dtype=torch.int64)
    query, key = torch.arange(longest)[:, None], torch.arange(longest)[None, :]
    seen = blocks.mask_mod(entry, zero, query, key)
    expected = torch.cat([boolean_mask(parts, longest) for parts in entries])
    assert torch.equal(seen, expected[:, 0])
    size = longest // FLEX_BLOCK
    squares = expected.view(2, size, FLEX_BLOCK, size, FLEX_BLOCK).any(dim=4).any(dim=2)
    assert torch.equal(blocks.to_dense()[:, 0].bool(), squares)


PEAK = """
import torch
from pathlib import Path
from typing import Any
from fedllm.packing.attention import PartsPlan, parts_attention, boolean_mask
from tests.packing.test_attention import Layer, lay
torch.set_num_threads(1)
def peak_kib():
    # of this process alone: ru_maxrss begins with that of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
def grown(layout, prefix, rows):
    before = peak_kib()
    parts = lay([(prefix, rows)])
    tokens = parts[-1].stop
    qkv = [torch.randn(1, 2, tokens, 8).requires_grad_() for _ in range(3)]
    plan = PartsPlan([parts], tokens, "cpu") if layout == "parts" else None
    mask = None if layout == "parts" else boolean_mask(parts, tokens)
    parts_attention(Layer(1), *qkv, mask, parts=plan)[0].sum().backward()
    return (peak_kib() - before) // 1024
for layout in ("parts", "mask"):
    grown(layout, 8, [8, 8])
    print(grown(layout, 96, [250] * 32))
"""


def test_parts_need_no_memory_of_all_tokens_times_all() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120, check=True
    )
    parts_mib, mask_mib = map(int, done.stdout.split())
    # 8,096 tokens: a boolean for every pair is 62 MiB, a float four times that
    assert parts_mib < 40
    assert mask_mib > 62
