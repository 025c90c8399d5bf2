"""Greedy answers, a token per row and step, from prompts that were read in packed passes.

A row leaves when it ends and the next one joins, so that a step has as many rows as may be. They
are aligned on the right: keys are as far apart as their positions, so sliding windows stay right.
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

from fedllm.evaluation.reading import plan_passes, read
from fedllm.model.memory import give_back_freed
from fedllm.packing.batches import TokenRow
from fedllm.packing.slots import AdapterSlots

_ROOM = 64  # buffers are as wide as a multiple of it: their sizes repeat, so memory is reused


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What the model made of a row.

    `loss` is the sum over the tokens of the row's answer; `tokens` are what the model wrote
    itself, the end included.
    """

    loss: float
    tokens: Sequence[int]


def answer_clients(
    slots: AdapterSlots,
    clients: Sequence[Sequence[TokenRow]],
    *,
    way: str,
    batch_size: int,
    most_tokens: int,
    ends: Collection[int],
) -> list[Answered]:
    """Return the answer loss and the greedy answer of every client's rows, one after the other.

    A prefix that the rows of a client share is computed once per pass; a row without a prompt
    gets no answer.

    Args:
        slots: with the adapter that is installed, or with none.
        clients: their rows.
        way: how the model is set to share prefixes.
        batch_size: most rows in a pass, and in a step.
        most_tokens: of an answer.
        ends: tokens that end an answer.
    """
    slots.evaluate()
    steps = _Steps(slots, most_tokens=most_tokens, ends=ends)
    losses: dict[int, float] = {}
    tokens: dict[int, Sequence[int]] = {}
    with torch.inference_mode():
        for groups in plan_passes(clients, way=way, batch_size=batch_size):
            # without the configuration: no layer drops what a shorter row still needs
            cache = DynamicCache()
            reading = read(slots, groups, way, cache)
            losses |= reading.losses
            rows = [_Row(keys, reading.firsts[place]) for place, keys in reading.keys.items()]
            tokens |= {place: row.tokens for place, row in zip(reading.keys, rows, strict=True)}
            rows = [row for row in rows if not steps.is_over(row)]
            while rows:
                room = batch_size - len(steps.rows)
                steps.join(rows[:room], cache)
                rows = rows[room:]
                steps.take_until(batch_size - 1)
        steps.take_until(0)
    return [
        Answered(loss=losses[place], tokens=tokens.get(place, ())) for place in range(len(losses))
    ]


class _Row:
    """A row that is being answered: where its prompt's keys are, and what was written so far."""

    def __init__(self, keys: Sequence[int], first: int) -> None:
        self.keys = keys
        self.tokens = [first]


class _Steps:
    """The rows that are being answered, and the keys and values of all they consist of.

    Before a step every row has `width` key positions, of which the first `gap` are not its own,
    and a last token that was not computed yet.
    """

    def __init__(self, slots: AdapterSlots, *, most_tokens: int, ends: Collection[int]) -> None:
        self.rows: list[_Row] = []
        self._model = slots.model
        self._device = slots.device
        self._most_tokens = most_tokens
        self._ends = ends
        self._gaps: list[int] = []
        self._width = 0
        self._layers: list[_Layer] = []

    def is_over(self, row: _Row) -> bool:
        """Say whether a row has its last token."""
        return row.tokens[-1] in self._ends or len(row.tokens) >= self._most_tokens

    def join(self, rows: Sequence[_Row], cache: DynamicCache) -> None:
        """Let rows take part whose prompts are in the cache of a pass."""
        width = max([self._width, *(len(row.keys) for row in rows)])
        gaps = [width - len(row.keys) for row in rows]
        # not seen, but finite: a row's own
        keys = [[row.keys[0]] * gap + [*row.keys] for gap, row in zip(gaps, rows, strict=True)]
        keys_NW = torch.tensor(keys, device=self._device)
        self._layers = self._layers or [_Layer() for _ in cache.layers]
        grew = False
        for layer, read_layer in zip(self._layers, cache.layers, strict=True):
            keys_NHWD = _gathered(read_layer.keys, keys_NW)
            values_NHWD = _gathered(read_layer.values, keys_NW)
            if self.rows:
                keys_NHWD = _joined(layer.keys, keys_NHWD)
                values_NHWD = _joined(layer.values, values_NHWD)
            grew |= layer.hold(keys_NHWD, values_NHWD)
        if grew:
            give_back_freed()  # the smaller buffers fit nothing that follows
        self._gaps = [gap + width - self._width for gap in self._gaps] + gaps
        self._width = width
        self.rows += rows

    def take_until(self, num_rows: int) -> None:
        """Take steps until at most so many rows are left."""
        with _attention_of_steps(self._model):
            while len(self.rows) > num_rows:
                self._take()

    def _take(self) -> None:
        """Write one more token of every row; those that are over then leave."""
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
        self._leave()

    def _leave(self) -> None:
        kept = [n for n, row in enumerate(self.rows) if not self.is_over(row)]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[n] for n in kept]
        least = min((self._gaps[n] for n in kept), default=self._width)
        self._gaps = [self._gaps[n] - least for n in kept]
        self._width -= least
        kept_N = torch.tensor(kept, dtype=torch.int64, device=self._device)
        for layer in self._layers:
            layer.hold(layer.keys[kept_N, :, least:], layer.values[kept_N, :, least:])


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values with room behind them: most steps write a token and copy nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self._roomy: list[Tensor] = []

    def hold(self, keys_NHWD: Tensor, values_NHWD: Tensor) -> bool:
        """Put copies of these in place of all others; return whether that took larger buffers."""
        self.lazy_initialization(keys_NHWD, values_NHWD)
        before, self._roomy = (
            self._roomy,
            [
                _with_room(x_NHWD, roomy)
                for x_NHWD, roomy in zip(
                    (keys_NHWD, values_NHWD), self._roomy or (None, None), strict=True
                )
            ],
        )
        self._show(*keys_NHWD.shape[::2])
        return not before or before[0] is not self._roomy[0]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (N, H, tokens, D) and return all."""
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        if stop > self._roomy[0].shape[2]:
            self._roomy = [_with_room(x, None, stop) for x in (self.keys, self.values)]
        rows = len(key_states)
        for roomy_XHYD, new in zip(self._roomy, (key_states, value_states), strict=True):
            roomy_XHYD[:rows, :, start:stop] = new
        self._show(rows, stop)
        return self.keys, self.values

    def _show(self, rows: int, width: int) -> None:
        self.keys, self.values = (roomy_XHYD[:rows, :, :width] for roomy_XHYD in self._roomy)


def _with_room(x_NHWD: Tensor, roomy_XHYD: Tensor | None, width: int = 0) -> Tensor:
    """Return a copy at the beginning of `roomy_XHYD`, or of a new buffer where that is too small.

    Args:
        x_NHWD: keys or values that are no part of `roomy_XHYD`.
        roomy_XHYD: the buffer so far.
        width: positions for which there has to be room.
    """
    num_rows, heads, positions, features = x_NHWD.shape
    width = max(width, positions)
    if roomy_XHYD is None or roomy_XHYD.shape[0] < num_rows or roomy_XHYD.shape[2] < width:
        roomy_XHYD = x_NHWD.new_zeros(num_rows, heads, -(-width // _ROOM) * _ROOM, features)
    roomy_XHYD[:num_rows, :, :positions] = x_NHWD
    return roomy_XHYD


@contextmanager
def _attention_of_steps(model: Any) -> Iterator[None]:
    """FlexAttention is for blocks of queries; a step has one query per row."""
    before = model.config._attn_implementation
    if before == "flex_attention":
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if before == "flex_attention":
            model.set_attn_implementation(before)


def _gathered(x_1HTD: Tensor, keys_NW: Tensor) -> Tensor:
    """Return every row's own of what a pass computed (N, H, W, D)."""
    return x_1HTD[0][:, keys_NW].transpose(0, 1)


def _joined(before_NHWD: Tensor, new_NHWD: Tensor) -> Tensor:
    wider = new_NHWD.shape[2] - before_NHWD.shape[2]
    return torch.cat([nn.functional.pad(before_NHWD, (0, 0, wider, 0)), new_NHWD])
