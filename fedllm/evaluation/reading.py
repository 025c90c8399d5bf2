"""Forward passes over rows to evaluate; the rows of a client share their common prefix.

A packed pass computes prompts together with their answers. Its logits give the loss of every
answer, and the first token that the model itself would write. Its keys and values are what the
next tokens attend to. Legend: N rows, T packed tokens, U positions with logits, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from fedllm.packing.attention import fitted
from fedllm.packing.batches import TokenRow, collate, token_losses
from fedllm.packing.losses import cross_entropies, forward
from fedllm.packing.micro_batches import max_pass_tokens, prefix_of
from fedllm.packing.sequences import (
    Packed,
    RowGroup,
    length_of,
    own_tokens,
    pack_groups,
    plan_packs,
)
from fedllm.packing.slots import AdapterSlots


@dataclass(frozen=True, kw_only=True)
class PassOutput:
    """The output of a pass for every row, by the row's place.

    `losses` are sums over the answer's tokens. `prompt_keys` are the indices of the prompt's
    tokens in the pass, in their order. `first_tokens` are the tokens that the model writes after
    the prompts. The last two have no entry for a row without a prompt.
    """

    losses: Mapping[int, float]
    prompt_keys: Mapping[int, Sequence[int]]
    first_tokens: Mapping[int, int]


def num_targets(row: TokenRow) -> int:
    """Return the number of tokens of a row's answer that follow a token, so have a loss."""
    return len(row.answer_ids) - (not row.prompt_ids)


def plan_passes(
    clients: Sequence[Sequence[TokenRow]], *, layout: str, batch_size: int
) -> list[list[RowGroup]]:
    """Divide the rows of all clients into passes of at most `batch_size` rows.

    A pass has at most the tokens of a training pass without a budget (`max_pass_tokens`). A row's
    place is its index in the list of all clients' rows. Rows of a client stay together if they
    fit; neighbours have similar lengths.
    """
    rows = [row for client in clients for row in client]
    lengths = [length_of(row) for row in rows]
    max_tokens = max_pass_tokens(layout, lengths)
    groups: list[RowGroup] = []
    start = 0
    for client in clients:
        places = sorted(range(start, start + len(client)), key=lambda place: lengths[place])
        start += len(client)
        prefix = prefix_of(client, layout)
        packs = plan_packs(
            [lengths[place] for place in places],
            prefix,
            max_rows=batch_size,
            max_tokens=max_tokens,
        )
        groups += [
            RowGroup(rows=rows, places=[places[n] for n in pack], prefix=prefix) for pack in packs
        ]
    groups.sort(key=lambda group: lengths[group.places[-1]])
    return _joined(groups, max_rows=batch_size, max_tokens=max_tokens)


def answer_losses(
    slots: AdapterSlots, clients: Sequence[Sequence[TokenRow]], *, layout: str, batch_size: int
) -> list[float]:
    """Return the summed loss of every row's answer, client after client."""
    slots.evaluate()
    losses: dict[int, float] = {}
    with torch.inference_mode():
        for groups in plan_passes(clients, layout=layout, batch_size=batch_size):
            losses |= compute_pass(slots, groups, layout).losses
    return [losses[place] for place in range(len(losses))]


def padded_losses(slots: AdapterSlots, rows: Sequence[TokenRow], batch_size: int) -> list[float]:
    """Return the summed loss of every row's answer, computed in padded batches."""
    slots.evaluate()
    losses = [0.0] * len(rows)
    lengths = [(len(row.answer_ids), len(row.prompt_ids)) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: (*lengths[place], place))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = collate(
                [rows[place] for place in places],
                loss_on="last_answer",
                pad_token=slots.pad_token,
                device=slots.device,
            )
            sums = token_losses(slots.model, batch).double().sum(dim=1).tolist()
            for place, loss in zip(places, sums, strict=True):
                losses[place] = loss
    return losses


def compute_pass(
    slots: AdapterSlots, groups: Sequence[RowGroup], layout: str, cache: DynamicCache | None = None
) -> PassOutput:
    """Compute one pass; the caller has entered `torch.inference_mode`.

    Args:
        slots: the model, with its installed adapter or with none.
        groups: the rows; their places have to be distinct.
        layout: the packed layout that the model is set to.
        cache: takes the keys and values; None: they are not kept.
    """
    packed = pack_groups(groups, loss_on="last_answer", device=slots.device, merge_targets=False)
    packed = fitted(packed, layout)
    caching = {} if cache is None else {"use_cache": True, "past_key_values": cache}
    output = forward(slots.model, packed, layout, kept=packed.kept_U, **caching)
    logits_UV = output.logits[0]
    prompt_keys = _prompt_keys(groups, packed)
    return PassOutput(
        losses=_losses(groups, packed, logits_UV),
        prompt_keys=prompt_keys,
        first_tokens=_first_tokens(packed, logits_UV, prompt_keys),
    )


def _joined(groups: Sequence[RowGroup], *, max_rows: int, max_tokens: int) -> list[list[RowGroup]]:
    passes: list[list[RowGroup]] = []
    num_rows = num_tokens = 0
    for group in groups:
        computed = group.prefix + sum(
            own_tokens(length_of(group.rows[place]), group.prefix) for place in group.places
        )
        too_many = num_rows + len(group.places) > max_rows
        if not passes or too_many or num_tokens + computed > max_tokens:
            passes.append([])
            num_rows = num_tokens = 0
        passes[-1].append(group)
        num_rows += len(group.places)
        num_tokens += computed
    return passes


def _losses(groups: Sequence[RowGroup], packed: Packed, logits_UV: Tensor) -> dict[int, float]:
    assert packed.rows_K is not None, "targets were merged"
    losses_K = cross_entropies(logits_UV, packed.inverse_K, packed.targets_K).tolist()
    sums = {place: 0.0 for group in groups for place in group.places}
    for place, loss in zip(packed.rows_K.tolist(), losses_K, strict=True):
        sums[place] += loss
    return sums


def _prompt_keys(groups: Sequence[RowGroup], packed: Packed) -> dict[int, list[int]]:
    own = {part.row: range(part.start, part.stop) for part in packed.parts}
    keys: dict[int, list[int]] = {}
    begin = 0
    for group in groups:
        prefix = range(begin, begin + group.prefix)
        begin += group.prefix
        for place in group.places:
            row = own.get(place, range(0))
            begin += len(row)
            prompt = len(group.rows[place].prompt_ids)
            if prompt:
                keys[place] = [*prefix, *row][:prompt]
    return keys


def _first_tokens(
    packed: Packed, logits_UV: Tensor, prompt_keys: Mapping[int, Sequence[int]]
) -> dict[int, int]:
    ends_N = torch.tensor([keys[-1] for keys in prompt_keys.values()], dtype=torch.int64)
    places_N = torch.searchsorted(packed.kept_U, ends_N.to(packed.kept_U.device))
    return dict(zip(prompt_keys, logits_UV[places_N].argmax(dim=1).tolist(), strict=True))
