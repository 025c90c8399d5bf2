"""Packed sequences: rows as one sequence of parts, in which a shared prefix is computed once.

A part attends causally to itself, and to at most one earlier part, its prefix:

    rows of a step   a a a a b b b    a a a a c c    a a a a d d d d      the prefix has 4 tokens
    packed           a a a a | b b | c | d d d       a row's last token is a target only
    positions        0 1 2 3   4 5   4   4 5 6
    parts            prefix    row   row row

Legend: T packed tokens, U positions with logits, K targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.errors import DataError
from fedllm.packing.batches import LossOn, TokenRow, target_places

PREFIX, PADDING = -1, -2  # `row` of a part that belongs to no single row

MIN_SHARED = 8  # for a shorter prefix the calls cost more than the saved tokens


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a packed sequence: its tokens [start, stop).

    Token `start + j` has position `prefix_stop - prefix_start + j`. The prefix is a whole earlier
    part; there is none if both its ends are equal. `row` is the index of the row, or `PREFIX`, or
    `PADDING`.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0
    row: int = PREFIX

    @property
    def length(self) -> int:
        """The number of its tokens."""
        return self.stop - self.start

    @property
    def offset(self) -> int:
        """The position of its first token: the number of tokens of its prefix."""
        return self.prefix_stop - self.prefix_start


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed sequence, ready for one forward pass.

    `kept_U` are the indices whose logits are needed, sorted and unique. Target k reads the logits
    at `kept_U[inverse_K[k]]`; `inverse_K` is sorted. `weights_K` is the number of rows that have
    the target. `rows_K` is the row of each target; None if equal targets were merged. `num_tokens`
    counts the tokens of the rows, a shared prefix once per row; `computed_tokens` counts those of
    the forward pass.
    """

    tokens_1T: Tensor
    positions_1T: Tensor
    parts: tuple[Part, ...]
    kept_U: Tensor
    inverse_K: Tensor
    targets_K: Tensor
    weights_K: Tensor
    rows_K: Tensor | None
    num_tokens: int
    num_targets: int

    @property
    def computed_tokens(self) -> int:
        """The number of tokens that the forward pass computes."""
        return self.tokens_1T.shape[1]


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """The rows at `places`, which share their first `prefix` tokens."""

    rows: Sequence[TokenRow]
    places: Sequence[int]
    prefix: int


def text_of(row: TokenRow) -> list[int]:
    """Return a row's tokens: the prompt, then the answer."""
    return [*row.prompt_ids, *row.answer_ids]


def length_of(row: TokenRow) -> int:
    """Return the number of tokens of a row."""
    return len(row.prompt_ids) + len(row.answer_ids)


def own_tokens(length: int, prefix: int) -> int:
    """Return how many tokens of a row are computed after its prefix; its last token is not."""
    return max(0, length - 1 - prefix)


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all `texts` share, without the last token of each.

    The last token is never computed: it is only a target.
    """
    inputs = [list(text[:-1]) for text in texts]
    first, last = min(inputs), max(inputs)  # what these two share, all texts share
    pairs = zip(first, last, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(first))


def shared_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens to compute once for all `texts`; 0 if sharing does not pay."""
    prefix = common_prefix(texts) if len(texts) > 1 else 0
    return prefix if prefix >= MIN_SHARED else 0


def plan_packs(
    lengths: Sequence[int], prefix: int, *, max_rows: int | None, max_tokens: int | None
) -> list[list[int]]:
    """Divide the rows of a step into packs, in their order; each pack repeats the prefix.

    Args:
        lengths: tokens of each row, with the last one, which is only a target.
        prefix: number of tokens that the rows share.
        max_rows: rows of a pack; None: no bound.
        max_tokens: tokens that a pack computes; None: no bound.

    Raises:
        DataError: one row alone is longer than `max_tokens`.
    """
    packs: list[list[int]] = []
    computed = 0
    for place, length in enumerate(lengths):
        check_fits(length, max_tokens)
        own = own_tokens(length, prefix)
        full = not packs or len(packs[-1]) == max_rows
        if full or (max_tokens is not None and computed + own > max_tokens):
            packs.append([])
            computed = prefix
        packs[-1].append(place)
        computed += own
    return packs


def check_fits(length: int, max_tokens: int | None) -> None:
    """Raise DataError if one row of `length` tokens is longer than the budget."""
    computed = length - 1
    if max_tokens is not None and computed > max_tokens:
        raise DataError(
            f"training.micro_batch_tokens: got {max_tokens}, a training row of {length} tokens"
            f" computes {computed} (its last one is a target only); need at least {computed}, or"
            f" data.cutoff_tokens: {max_tokens + 1}"
        )


def pack(
    rows: Sequence[TokenRow],
    places: Sequence[int],
    prefix: int,
    *,
    loss_on: LossOn,
    device: torch.device | str,
    merge_targets: bool = True,
) -> Packed:
    """Return the rows at `places` as one packed sequence.

    Args:
        rows: all rows of the step.
        places: the rows of this pack.
        prefix: how many first tokens these rows share; 0: they share nothing.
        loss_on: the tokens that carry loss.
        device: of the tensors.
        merge_targets: merge targets of one position and token to one with a weight; else every
            target has its row in `rows_K`.
    """
    group = RowGroup(rows=rows, places=places, prefix=prefix)
    return pack_groups([group], loss_on=loss_on, device=device, merge_targets=merge_targets)


def pack_groups(
    groups: Sequence[RowGroup],
    *,
    loss_on: LossOn,
    device: torch.device | str,
    merge_targets: bool = True,
) -> Packed:
    """Return several groups, each after its own prefix, as one packed sequence; see `pack`."""
    builder = _PackBuilder()
    for group in groups:
        builder.add(group, loss_on)
    return builder.packed(device, merge_targets)


class _PackBuilder:
    """A builder of a packed sequence; it collects tokens, parts and targets in lists."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._parts: list[Part] = []
        self._targets: list[tuple[int, int, int]] = []  # (index, token, row)
        self._num_tokens = 0

    def add(self, group: RowGroup, loss_on: LossOn) -> None:
        """Append a group: its prefix, then one part per row."""
        shared = text_of(group.rows[group.places[0]])[: group.prefix] if group.places else []
        begin = self._part(shared, row=PREFIX, prefix=(0, 0))
        prefix = (begin, begin + len(shared))
        for place in group.places:
            row = group.rows[place]
            text = text_of(row)
            start = self._part(text[group.prefix : -1], row=place, prefix=prefix)
            for position in target_places(row, loss_on):
                before = position - 1
                index = start + before - len(shared) if before >= len(shared) else begin + before
                self._targets.append((index, text[position], place))
            self._num_tokens += len(text)

    def packed(self, device: torch.device | str, merge_targets: bool) -> Packed:
        """Return the packed sequence."""
        if not self._tokens:
            self._part([0], row=PADDING, prefix=(0, 0))  # a pass needs at least one token
        targets = sorted(self._targets, key=lambda target: target[0])
        counts = dict.fromkeys((target[:2] for target in targets), 0)
        for target in targets:
            counts[target[:2]] += 1
        pairs = list(counts) if merge_targets else [target[:2] for target in targets]
        weights = list(counts.values()) if merge_targets else [1] * len(targets)
        kept = sorted({index for index, _ in pairs})
        number = {index: n for n, index in enumerate(kept)}

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device)

        return Packed(
            tokens_1T=tensor(self._tokens).unsqueeze(0),
            positions_1T=tensor(self._positions).unsqueeze(0),
            parts=tuple(self._parts),
            kept_U=tensor(kept),
            inverse_K=tensor([number[index] for index, _ in pairs]),
            targets_K=tensor([token for _, token in pairs]),
            weights_K=tensor(weights).float(),
            rows_K=None if merge_targets else tensor([row for _, _, row in targets]),
            num_tokens=self._num_tokens,
            num_targets=len(targets),
        )

    def _part(self, tokens: Sequence[int], *, row: int, prefix: tuple[int, int]) -> int:
        """Append a part, if it has tokens, and return its start."""
        start, offset = len(self._tokens), prefix[1] - prefix[0]
        self._tokens += tokens
        self._positions += range(offset, offset + len(tokens))
        if tokens:
            ends = {"prefix_start": prefix[0], "prefix_stop": prefix[1]} if offset else {}
            self._parts.append(Part(start=start, stop=len(self._tokens), row=row, **ends))
        return start


def padded_to(packed: Packed, num_tokens: int) -> Packed:
    """Return `packed` with a part of padding after it, `num_tokens` long in total."""
    missing = num_tokens - packed.computed_tokens
    if not missing:
        return packed
    filler_1P = packed.tokens_1T.new_zeros((1, missing))
    positions_1P = torch.arange(missing, device=filler_1P.device).unsqueeze(0)
    part = Part(start=packed.computed_tokens, stop=num_tokens, row=PADDING)
    return replace(
        packed,
        tokens_1T=torch.cat([packed.tokens_1T, filler_1P], dim=1),
        positions_1T=torch.cat([packed.positions_1T, positions_1P], dim=1),
        parts=(*packed.parts, part),
    )
