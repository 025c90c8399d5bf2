"""The forward passes of an optimizer step, for each layout of its rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from fedllm.packing.attention import INPUTS, SHARED, fitted
from fedllm.packing.batches import Batch, LossOn, TokenRow, collate, token_losses
from fedllm.packing.losses import packed_losses
from fedllm.packing.row_dropout import Piece
from fedllm.packing.sequences import (
    PADDING,
    PREFIX,
    Packed,
    check_fits,
    length_of,
    pack,
    plan_packs,
    shared_prefix,
    text_of,
)

DENSE_TOKENS = 1024
"""Max tokens of a pass with a dense mask and no budget: the mask grows with their square."""

PARTS_TOKENS = 2048
"""Max tokens of a pass by parts and no budget: more take memory and save no time."""

FLEX_TOKENS = 16_384
"""Max tokens of a pass with a block mask and no budget: it is made from a dense mask."""

# per layout: max tokens of a pass, and how many rows of the longest length fit nevertheless: with
# fewer rows passes repeat the prefix often. For `packed` transformers makes a dense mask too.
_PASS_BOUNDS: Mapping[str, tuple[int, int]] = {
    "parts": (PARTS_TOKENS, 4),
    "flex": (FLEX_TOKENS, 4),
    "mask": (DENSE_TOKENS, 1),
    "packed": (DENSE_TOKENS, 1),
}

RowSeed = Callable[[int], int]


class Pass(Protocol):
    """A forward pass of some rows of an optimizer step."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens of its rows, without padding."""

    @property
    def num_targets(self) -> int:
        """The number of tokens that carry loss."""

    @property
    def computed_tokens(self) -> int:
        """The number of tokens that the forward pass computes."""

    def pieces(self, row_seed: RowSeed, prefix_seed: int) -> list[Piece]:
        """Return the pieces for dropout; `row_seed` gives a row's seed by its place in the step."""

    def loss_sum(self, model: nn.Module) -> Tensor:
        """Return the sum of the losses of all targets, a scalar."""


@dataclass(frozen=True, kw_only=True)
class PaddedPass:
    """A pass of padded rows; `places` are their places in the step."""

    batch: Batch
    places: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of its rows, without padding."""
        return self.batch.num_tokens

    @property
    def num_targets(self) -> int:
        """The number of tokens that carry loss."""
        return self.batch.num_targets

    @property
    def computed_tokens(self) -> int:
        """The number of tokens that the forward pass computes."""
        return self.batch.tokens_NT.numel()

    def pieces(self, row_seed: RowSeed, prefix_seed: int) -> list[Piece]:  # noqa: ARG002
        """Return one piece per row, from the row's first token on."""
        width = self.batch.tokens_NT.shape[1]
        return [
            Piece(entry=n, start=start, stop=width, seed=row_seed(place))
            for n, (start, place) in enumerate(zip(self.batch.starts, self.places, strict=True))
        ]

    def loss_sum(self, model: nn.Module) -> Tensor:
        """Return the sum of the losses of all targets, a scalar."""
        return token_losses(model, self.batch).sum()


@dataclass(frozen=True, kw_only=True)
class PackedPass:
    """A pass of packed rows in one layout."""

    packed: Packed
    layout: str

    @property
    def num_tokens(self) -> int:
        """The number of tokens of its rows; a shared prefix counts once per row."""
        return self.packed.num_tokens

    @property
    def num_targets(self) -> int:
        """The number of tokens that carry loss."""
        return self.packed.num_targets

    @property
    def computed_tokens(self) -> int:
        """The number of tokens that the forward pass computes."""
        return self.packed.computed_tokens

    def pieces(self, row_seed: RowSeed, prefix_seed: int) -> list[Piece]:
        """Return one piece per part; the prefix has the same seed in every pass of the step."""
        return [
            Piece(
                entry=0,
                start=part.start,
                stop=part.stop,
                seed=prefix_seed if part.row == PREFIX else row_seed(part.row),
            )
            for part in self.packed.parts
            if part.row != PADDING
        ]

    def loss_sum(self, model: nn.Module) -> Tensor:
        """Return the sum of the losses of all targets, a scalar."""
        return packed_losses(model, self.packed, self.layout)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the rows of an optimizer step become passes; None: no bound.

    `by_length` lets padded rows of similar length go together; else they stay in their order.
    `places` are the rows of the step to compute; None: all. The prefix stays that of all rows.
    """

    loss_on: LossOn
    pad_token: int
    device: torch.device | str
    max_rows: int | None = None
    max_tokens: int | None = None
    by_length: bool = True
    places: Sequence[int] | None = None

    def of(self, rows: Sequence[TokenRow]) -> Sequence[int]:
        """Return the places of the rows of a step that are computed."""
        return range(len(rows)) if self.places is None else self.places


def max_pass_tokens(layout: str, lengths: Sequence[int]) -> int:
    """Return the max tokens of a pass without a budget.

    Args:
        layout: of the packed rows.
        lengths: tokens of each row.
    """
    max_tokens, min_rows = _PASS_BOUNDS[layout]
    return max(max_tokens, min_rows * max(lengths, default=0))


def prefix_of(rows: Sequence[TokenRow], layout: str) -> int:
    """Return how many first tokens of these rows a layout computes once."""
    return shared_prefix([text_of(row) for row in rows]) if layout in SHARED else 0


Packer = Callable[[Sequence[TokenRow], Cut], Sequence[Pass]]


def _padded(rows: Sequence[TokenRow], cut: Cut) -> list[PaddedPass]:
    batches = _plan_batches([length_of(row) for row in rows], cut.of(rows), cut)
    return [
        PaddedPass(
            batch=collate(
                [rows[place] for place in places],
                loss_on=cut.loss_on,
                pad_token=cut.pad_token,
                device=cut.device,
            ),
            places=places,
        )
        for places in batches
    ]


def _plan_batches(lengths: Sequence[int], places: Sequence[int], cut: Cut) -> list[list[int]]:
    """Cut rows into batches; `by_length`, no row is padded to more than twice its length."""
    order = list(places)
    if cut.by_length:
        order.sort(key=lengths.__getitem__)
    batches: list[list[int]] = []
    for place in order:
        check_fits(lengths[place], cut.max_tokens)
        before = batches[-1] if batches else []
        widths = [max(1, lengths[other] - 1) for other in [*before, place]]
        fits = cut.max_tokens is None or len(widths) * max(widths) <= cut.max_tokens
        alike = not cut.by_length or max(widths) <= 2 * min(widths)
        if not batches or len(before) == cut.max_rows or not fits or not alike:
            batches.append([])
        batches[-1].append(place)
    return batches


def _packed(rows: Sequence[TokenRow], cut: Cut, *, layout: str) -> list[PackedPass]:
    # the prefix of the whole step, not of a pass: so cutting a step changes rounding only
    prefix = prefix_of(rows, layout)
    lengths = [length_of(row) for row in rows]
    max_tokens = max_pass_tokens(layout, lengths) if cut.max_tokens is None else cut.max_tokens
    own = cut.of(rows)
    plan = plan_packs(
        [lengths[place] for place in own],
        prefix,
        max_rows=cut.max_rows,
        max_tokens=max_tokens,
    )
    packs = (
        pack(rows, [own[n] for n in some], prefix, loss_on=cut.loss_on, device=cut.device)
        for some in plan
    )
    return [PackedPass(packed=fitted(packed, layout), layout=layout) for packed in packs]


PACKERS: Mapping[str, Packer] = {
    "padded": _padded,
    **{layout: partial(_packed, layout=layout) for layout in INPUTS},
}
"""The packers per layout: each makes passes from the rows of an optimizer step."""
