"""Rows as padded batches, and the loss of their tokens.

Rows are padded on the left. So the tokens that carry loss end in the same column, and logits are
computed for the last columns only. Legend: N rows, T positions, K positions with logits.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

LossOn = Literal["answer", "last_answer", "all"]
"""The tokens that carry loss: of all answers, of the row's last answer, or all but the first."""

_IGNORED = -100


class TokenRow(Protocol):
    """A row of tokens, as the token cache has it."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The prompt's tokens."""

    @property
    def answer_ids(self) -> Sequence[int]:
        """The answer's tokens, with the end of the sequence."""

    @property
    def prompt_targets(self) -> Sequence[int]:
        """The places in the prompt of the tokens of earlier answers, in order, without 0."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A padded batch of rows for a forward pass; the last token of a row is a target only.

    `mask_NT` and `positions_NT` are None where no row is padded. `starts` are the rows' first
    real positions.
    """

    tokens_NT: Tensor
    mask_NT: Tensor | None
    positions_NT: Tensor | None
    targets_NK: Tensor
    starts: tuple[int, ...]
    num_tokens: int
    num_targets: int

    def counts(self) -> Tensor:
        """Return the number of targets per row (N,)."""
        return (self.targets_NK != _IGNORED).sum(dim=1)


def target_places(row: TokenRow, loss_on: LossOn) -> list[int]:
    """Return the places of a row's tokens that carry loss, in order."""
    prompt = len(row.prompt_ids)
    # no token before the first one could predict it
    first = 1 if loss_on == "all" else max(1, prompt)
    earlier = row.prompt_targets if loss_on == "answer" else ()
    return [*earlier, *range(first, prompt + len(row.answer_ids))]


def collate(
    rows: Sequence[TokenRow], *, loss_on: LossOn, pad_token: int, device: torch.device | str
) -> Batch:
    """Return `rows` as one padded batch."""
    texts = [[*row.prompt_ids, *row.answer_ids] for row in rows]
    places = [target_places(row, loss_on) for row in rows]
    targets = [_aligned(text, places) for text, places in zip(texts, places, strict=True)]
    # a row of one token has no target and nothing to compute: it is padding only, without loss
    width = max(1, *(len(text) - 1 for text in texts))
    kept = max(1, *(len(row) for row in targets))
    starts = tuple(width + 1 - len(text) for text in texts)
    padded = [[pad_token] * s + text[:-1] for s, text in zip(starts, texts, strict=True)]
    aligned = [[_IGNORED] * (kept - len(row)) + row for row in targets]
    mask_NT = positions_NT = None
    if any(starts):
        starts_N1 = torch.tensor(starts).unsqueeze(1)
        positions_NT = torch.arange(width) - starts_N1
        mask_NT = (positions_NT >= 0).long().to(device)
        positions_NT = positions_NT.clamp_(min=0).to(device)
    return Batch(
        tokens_NT=torch.tensor(padded).to(device),
        mask_NT=mask_NT,
        positions_NT=positions_NT,
        targets_NK=torch.tensor(aligned).to(device),
        starts=starts,
        num_tokens=sum(map(len, texts)),
        num_targets=sum(map(len, places)),
    )


def _aligned(text: Sequence[int], places: Sequence[int]) -> list[int]:
    """Return the tokens from the first target on; those without loss are `_IGNORED`."""
    if not places:
        return []
    targets = [_IGNORED] * (len(text) - places[0])
    for place in places:
        targets[place - places[0]] = text[place]
    return targets


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross entropy per target (N, K), at least in float32; 0 where none is."""
    kept = batch.targets_NK.shape[1]
    options = {"logits_to_keep": kept} if keeps_logits(model) else {}
    output = model(
        input_ids=batch.tokens_NT,
        attention_mask=batch.mask_NT,
        position_ids=batch.positions_NT,
        use_cache=False,
        **options,
    )
    logits_NKV = output.logits[:, -kept:]
    logits_NKV = logits_NKV.to(torch.promote_types(logits_NKV.dtype, torch.float32))
    losses = nn.functional.cross_entropy(
        logits_NKV.flatten(0, 1),
        batch.targets_NK.flatten(),
        ignore_index=_IGNORED,
        reduction="none",
    )
    return losses.view_as(batch.targets_NK)


def keeps_logits(model: nn.Module) -> bool:
    """Say whether the model can compute the logits of its last positions alone."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
