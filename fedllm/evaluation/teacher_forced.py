"""Answers under teacher forcing: the likeliest token at each place of the true answer.

The published FlexLoRA code (2402.11505) takes its Rouge-L from such tokens. The model sees the true
answer up to each of them, so they score higher than an answer that it writes by itself: a number to
compare with published ones, and with nothing else.
"""

from collections.abc import Sequence

import torch

from fedllm.evaluation.reading import plan_passes
from fedllm.packing.attention import fitted
from fedllm.packing.batches import TokenRow, collate, keeps_logits
from fedllm.packing.losses import forward
from fedllm.packing.sequences import pack_groups
from fedllm.packing.slots import AdapterSlots

_IGNORED = -100


def teacher_forced_tokens(
    slots: AdapterSlots, clients: Sequence[Sequence[TokenRow]], batch_size: int
) -> list[list[int]]:
    """Return the likeliest token at every place of every row's answer, client after client."""
    slots.evaluate()
    with torch.inference_mode():
        if slots.layout == "padded":
            return _padded(slots, [row for client in clients for row in client], batch_size)
        return _packed(slots, clients, batch_size)


def _packed(
    slots: AdapterSlots, clients: Sequence[Sequence[TokenRow]], batch_size: int
) -> list[list[int]]:
    tokens: list[list[int]] = [[] for client in clients for _ in client]
    for groups in plan_passes(clients, layout=slots.layout, batch_size=batch_size):
        packed = fitted(
            pack_groups(groups, loss_on="last_answer", device=slots.device, merge_targets=False),
            slots.layout,
        )
        assert packed.rows_K is not None, "targets were merged"
        logits_UV = forward(slots.model, packed, slots.layout, kept=packed.kept_U).logits[0]
        likeliest_K = logits_UV.argmax(dim=1)[packed.inverse_K]
        for place, token in zip(packed.rows_K.tolist(), likeliest_K.tolist(), strict=True):
            tokens[place].append(token)
    return tokens


def _padded(slots: AdapterSlots, rows: Sequence[TokenRow], batch_size: int) -> list[list[int]]:
    tokens: list[list[int]] = []
    for start in range(0, len(rows), batch_size):
        batch = collate(
            rows[start : start + batch_size],
            loss_on="last_answer",
            pad_token=slots.pad_token,
            device=slots.device,
        )
        kept = batch.targets_NK.shape[1]
        logits_NKV = slots.model(
            input_ids=batch.tokens_NT,
            attention_mask=batch.mask_NT,
            position_ids=batch.positions_NT,
            use_cache=False,
            **({"logits_to_keep": kept} if keeps_logits(slots.model) else {}),
        ).logits[:, -kept:]
        is_target_NK = batch.targets_NK != _IGNORED
        for row_K, is_target_K in zip(logits_NKV.argmax(dim=2), is_target_NK, strict=True):
            tokens.append(row_K[is_target_K].tolist())
    return tokens
