"""Rows as one flat sequence of parts, in which a prefix that rows share is computed once.

A part attends to itself, causally, and to at most one earlier part, its prefix:

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

PREFIX, PADDING = -1, -2  # what a part is that is no row's own

LEAST_SHARED = 8  # a shorter prefix costs more calls than it saves tokens


@dataclass(frozen=True, kw_only=True)
class Part:
    """Tokens [start, stop) of a packed sequence.

    Its token `start + j` has position `prefix_stop - prefix_start + j`. The prefix is a whole
    earlier part; none where both ends are equal. `row` is the index of the row, or `PREFIX`, or
    `PADDING`.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0
    row: int = PREFIX

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return self.stop - self.start

    @property
    def offset(self) -> int:
        """The position of its first token: how many tokens its prefix has."""
        return self.prefix_stop - self.prefix_start


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Parts ready for one forward pass.

    `kept_U` are the indices whose logits are needed, sorted and unique; target k reads those at
    `kept_U[inverse_K[k]]`, and `inverse_K` is sorted. `weights_K` says how many rows have the
    target; `rows_K` whose it is, where targets were not merged. `num_tokens` counts the rows'
    tokens, a shared prefix once per row; `computed_tokens` those of the forward pass.
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
        """How many tokens the forward pass computes."""
        return self.tokens_1T.shape[1]


@dataclass(frozen=True, kw_only=True)
class RowGroup:
    """Rows at `places`, of which the first `prefix` tokens are the same."""

    rows: Sequence[TokenRow]
    places: Sequence[int]
    prefix: int


def text_of(row: TokenRow) -> list[int]:
    """Return a row's tokens: the prompt, then the answer."""
    return [*row.prompt_ids, *row.answer_ids]


def length_of(row: TokenRow) -> int:
    """Return how many tokens a row has."""
    return len(row.prompt_ids) + len(row.answer_ids)


def own_tokens(length: int, prefix: int) -> int:
    """Return what a row of `length` tokens computes behind its prefix: not its last token."""
    return max(0, length - 1 - prefix)


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all `texts` share, the last token of each left out.

    The last token is never computed: it is a target only.
    """
    inputs = [list(text[:-1]) for text in texts]
    first, last = min(inputs), max(inputs)  # what these two share, all between them share
    pairs = zip(first, last, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(first))


def shared_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens to compute once for all `texts`: 0 where it does not pay."""
    prefix = common_prefix(texts) if len(texts) > 1 else 0
    return prefix if prefix >= LEAST_SHARED else 0


def plan_packs(
    lengths: Sequence[int], prefix: int, *, most_rows: int | None, most_tokens: int | None
) -> list[list[int]]:
    """Cut the rows of a step into packs, in their order; every pack repeats the prefix.

    Args:
        lengths: tokens of each row, the last one, a target only, included.
        prefix: tokens that the rows share.
        most_rows: rows in a pack; None: no bound.
        most_tokens: tokens that a pack computes; None: no bound.

    Raises:
        DataError: a row that is longer than `most_tokens` by itself.
    """
    packs: list[list[int]] = []
    computed = 0
    for place, length in enumerate(lengths):
        check_fits(length, most_tokens)
        own = own_tokens(length, prefix)
        full = not packs or len(packs[-1]) == most_rows
        if full or (most_tokens is not None and computed + own > most_tokens):
            packs.append([])
            computed = prefix
        packs[-1].append(place)
        computed += own
    return packs


def check_fits(length: int, most_tokens: int | None) -> None:
    """Raise DataError if a row of `length` tokens is longer than the budget by itself."""
    computed = length - 1
    if most_tokens is not None and computed > most_tokens:
        raise DataError(
            f"training.micro_batch_tokens: got {most_tokens}, a training row of {length} tokens"
            f" computes {computed} (its last one is a target only); need at least {computed}, or"
            f" data.cutoff_tokens: {most_tokens + 1}"
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
        places: which of them are in this pack.
        prefix: how many first tokens all these rows share; 0: every row by itself.
        loss_on: which tokens carry loss.
        device: where the tensors go.
        merge_targets: one target with a weight where rows share its position and token; else
            every target has its row in `rows_K`.
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
    """Return several groups, each behind its own prefix, as one packed sequence; see `pack`."""
    builder = _PackBuilder()
    for group in groups:
        builder.add(group, loss_on)
    return builder.packed(device, merge_targets)


class _PackBuilder:
    """A packed sequence in the making, in lists."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._parts: list[Part] = []
        self._targets: list[tuple[int, int, int]] = []  # (index, token, row)
        self._num_tokens = 0

    def add(self, group: RowGroup, loss_on: LossOn) -> None:
        """Append a group's prefix and the own parts of its rows."""
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
        """Return it as tensors."""
        if not self._tokens:
            self._part([0], row=PADDING, prefix=(0, 0))  # a pass needs a token
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
        """Append a part, if it has tokens, and return where it starts."""
        start, offset = len(self._tokens), prefix[1] - prefix[0]
        self._tokens += tokens
        self._positions += range(offset, offset + len(tokens))
        if tokens:
            ends = {"prefix_start": prefix[0], "prefix_stop": prefix[1]} if offset else {}
            self._parts.append(Part(start=start, stop=len(self._tokens), row=row, **ends))
        return start


def padded_to(packed: Packed, num_tokens: int) -> Packed:
    """Return `packed` with a part of padding behind it, `num_tokens` long together."""
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
