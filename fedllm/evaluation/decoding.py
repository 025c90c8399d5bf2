"""Greedy decoding: one token per row and step, after packed passes have computed the prompts.

When a row is finished it leaves the batch and the next row takes its place, so that every step has
as many rows as possible. Rows are aligned on the right: keys are as far apart as their positions,
so sliding windows stay correct.
Legend: N rows, H heads, T tokens of a pass, W key positions, D features of a head.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from fedllm.evaluation.answers import Scored, ignore_scored
from fedllm.evaluation.reading import compute_pass, plan_passes
from fedllm.model.memory import give_back_freed
from fedllm.packing.batches import TokenRow
from fedllm.packing.slots import AdapterSlots

# the width of buffers is a multiple of this: their sizes repeat, so memory is reused
_WIDTH_MULTIPLE = 64


@dataclass(frozen=True, kw_only=True)
class RowAnswer:
    """The model's answer to a row, and its loss on the row's own answer.

    `loss` is the sum over the tokens of the row's own answer. `tokens` are the tokens that the
    model wrote, the end included.
    """

    loss: float
    tokens: Sequence[int]


def answer_clients(
    slots: AdapterSlots,
    clients: Sequence[Sequence[TokenRow]],
    *,
    layout: str,
    batch_size: int,
    max_tokens: int,
    ends: Collection[int],
    scored: Scored = ignore_scored,
) -> list[RowAnswer]:
    """Return the loss and the greedy answer of every row, client after client.

    A prefix that the rows of a client share is computed once per pass. A row without a prompt
    gets no answer.

    Args:
        slots: the model, with its installed adapter or with none.
        clients: the rows of each client.
        layout: the layout with a shared prefix that the model is set to.
        batch_size: maximum number of rows in a pass and in a step.
        max_tokens: maximum number of tokens of an answer.
        ends: tokens that end an answer.
        scored: called with the number of further rows after every pass.
    """
    slots.evaluate()
    batch = _DecodingBatch(slots, max_tokens=max_tokens, ends=ends)
    losses: dict[int, float] = {}
    tokens: dict[int, Sequence[int]] = {}
    with torch.inference_mode():
        for groups in plan_passes(clients, layout=layout, batch_size=batch_size):
            # without the model's configuration no layer drops keys that a shorter row needs
            cache = DynamicCache()
            give_back_freed()  # passes differ in size, so they cannot reuse each other's memory
            output = compute_pass(slots, groups, layout, cache)
            losses |= output.losses
            scored(len(output.losses))
            rows = [
                _DecodedRow(keys, output.first_tokens[place])
                for place, keys in output.prompt_keys.items()
            ]
            tokens |= {
                place: row.tokens for place, row in zip(output.prompt_keys, rows, strict=True)
            }
            rows = [row for row in rows if not batch.is_finished(row)]
            while rows:
                room = batch_size - len(batch.rows)
                batch.add(rows[:room], cache)
                rows = rows[room:]
                batch.step_until(batch_size - 1)
        batch.step_until(0)
    return [
        RowAnswer(loss=losses[place], tokens=tokens.get(place, ())) for place in range(len(losses))
    ]


class _DecodedRow:
    """Row that is being answered: the indices of its prompt's keys, and the tokens written."""

    def __init__(self, keys: Sequence[int], first: int) -> None:
        self.keys = keys
        self.tokens = [first]


class _DecodingBatch:
    """Rows that are being answered, with the keys and values of all their tokens but the last.

    Before a step every row has `width` key positions. The first `gap` of them are not its own.
    """

    def __init__(self, slots: AdapterSlots, *, max_tokens: int, ends: Collection[int]) -> None:
        self.rows: list[_DecodedRow] = []
        self._model = slots.model
        self._device = slots.device
        self._max_tokens = max_tokens
        self._ends = ends
        self._gaps: list[int] = []
        self._width = 0
        self._layers: list[_Layer] = []

    def is_finished(self, row: _DecodedRow) -> bool:
        """Return whether a row has its last token."""
        return row.tokens[-1] in self._ends or len(row.tokens) >= self._max_tokens

    def add(self, rows: Sequence[_DecodedRow], cache: DynamicCache) -> None:
        """Add rows whose prompts are in the cache of a pass."""
        width = max([self._width, *(len(row.keys) for row in rows)])
        gaps = [width - len(row.keys) for row in rows]
        # a gap holds keys of its own row: they are masked, but have to be finite
        keys = [[row.keys[0]] * gap + [*row.keys] for gap, row in zip(gaps, rows, strict=True)]
        keys_NW = torch.tensor(keys, device=self._device)
        self._layers = self._layers or [_Layer() for _ in cache.layers]
        grew = False
        for layer, pass_layer in zip(self._layers, cache.layers, strict=True):
            keys_NHWD = _gathered(pass_layer.keys, keys_NW)
            values_NHWD = _gathered(pass_layer.values, keys_NW)
            if self.rows:
                keys_NHWD = _joined(layer.keys, keys_NHWD)
                values_NHWD = _joined(layer.values, values_NHWD)
            grew |= layer.store(keys_NHWD, values_NHWD)
        if grew:
            give_back_freed()  # later buffers are larger, so these are not reused
        self._gaps = [gap + width - self._width for gap in self._gaps] + gaps
        self._width = width
        self.rows += rows

    def step_until(self, num_rows: int) -> None:
        """Take steps until at most `num_rows` rows are left."""
        with _attention_of_one_query(self._model):
            while len(self.rows) > num_rows:
                self._step()

    def _step(self) -> None:
        """Write one more token of every row, then remove the finished rows."""
        grew = [layer.reserve(self._width + 1) for layer in self._layers]
        if any(grew):
            give_back_freed()
        gaps_N1 = torch.tensor(self._gaps, device=self._device).unsqueeze(1)
        positions_W = torch.arange(self._width + 1, device=self._device)
        last_N1 = torch.tensor([row.tokens[-1:] for row in self.rows], device=self._device)
        logits_N1V = self._model(
            input_ids=last_N1,
            attention_mask=(positions_W >= gaps_N1).long(),
            position_ids=self._width - gaps_N1,
            past_key_values=Cache(layers=self._layers),
            use_cache=True,
        ).logits
        self._width += 1
        for row, token in zip(self.rows, logits_N1V[:, -1].argmax(dim=1).tolist(), strict=True):
            row.tokens.append(token)
        self._remove_finished()

    def _remove_finished(self) -> None:
        kept = [n for n, row in enumerate(self.rows) if not self.is_finished(row)]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[n] for n in kept]
        min_gap = min((self._gaps[n] for n in kept), default=self._width)
        self._gaps = [self._gaps[n] - min_gap for n in kept]
        self._width -= min_gap
        kept_N = torch.tensor(kept, dtype=torch.int64, device=self._device)
        for layer in self._layers:
            layer.store(layer.keys[kept_N, :, min_gap:], layer.values[kept_N, :, min_gap:])


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one layer in buffers with free space: most steps copy one token only."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def store(self, keys_NHWD: Tensor, values_NHWD: Tensor) -> bool:
        """Replace all keys and values by copies of these; return whether the buffers grew."""
        self.lazy_initialization(keys_NHWD, values_NHWD)
        before, self._buffers = (
            self._buffers,
            [
                _buffered(x_NHWD, buffer)
                for x_NHWD, buffer in zip(
                    (keys_NHWD, values_NHWD), self._buffers or (None, None), strict=True
                )
            ],
        )
        self._set_views(*keys_NHWD.shape[::2])
        return not before or before[0] is not self._buffers[0]

    def reserve(self, width: int) -> bool:
        """Make room for `width` positions; return whether the buffers grew."""
        if width <= self._buffers[0].shape[2]:
            return False
        rows, positions = self.keys.shape[0], self.keys.shape[2]
        self._buffers = [_buffered(x, None, width) for x in (self.keys, self.values)]
        self._set_views(rows, positions)
        return True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (N, H, tokens, D) and return all."""
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        self.reserve(stop)
        rows = len(key_states)
        for buffer_XHYD, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer_XHYD[:rows, :, start:stop] = new
        self._set_views(rows, stop)
        return self.keys, self.values

    def _set_views(self, rows: int, width: int) -> None:
        self.keys, self.values = (buffer_XHYD[:rows, :, :width] for buffer_XHYD in self._buffers)


def _buffered(x_NHWD: Tensor, buffer_XHYD: Tensor | None, width: int = 0) -> Tensor:
    """Return the buffer, or a new one if it is too small, with a copy of `x_NHWD` at its beginning.

    Args:
        x_NHWD: keys or values that do not lie in `buffer_XHYD`.
        buffer_XHYD: the buffer so far; None: there is none.
        width: minimum number of positions of the buffer.
    """
    num_rows, heads, positions, features = x_NHWD.shape
    width = max(width, positions)
    if buffer_XHYD is None or buffer_XHYD.shape[0] < num_rows or buffer_XHYD.shape[2] < width:
        buffer_XHYD = x_NHWD.new_zeros(
            num_rows, heads, -(-width // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, features
        )
    buffer_XHYD[:num_rows, :, :positions] = x_NHWD
    return buffer_XHYD


@contextmanager
def _attention_of_one_query(model: Any) -> Iterator[None]:
    """Use SDPA instead of FlexAttention, which needs blocks of queries: a step has one per row."""
    before = model.config._attn_implementation
    if before == "flex_attention":
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if before == "flex_attention":
            model.set_attn_implementation(before)


def _gathered(x_1HTD: Tensor, keys_NW: Tensor) -> Tensor:
    """Return the keys or values of every row (N, H, W, D), from those of a pass."""
    return x_1HTD[0][:, keys_NW].transpose(0, 1)


def _joined(before_NHWD: Tensor, new_NHWD: Tensor) -> Tensor:
    wider = new_NHWD.shape[2] - before_NHWD.shape[2]
    return torch.cat([nn.functional.pad(before_NHWD, (0, 0, wider, 0)), new_NHWD])
