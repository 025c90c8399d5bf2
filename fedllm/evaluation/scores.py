"""Scores of rows and of clients: answer loss, Rouge-L and exact match of generated answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedllm.config.models import EvaluationSection
from fedllm.evaluation.answers import generate_answers
from fedllm.evaluation.text import exact_match, rouge_l
from fedllm.model.batches import TokenRow, collate, token_losses
from fedllm.model.slots import AdapterSlots
from fedllm.storage.records import Scores


class ScoredRow(TokenRow, Protocol):
    """A row with the answers that count as right."""

    @property
    def references(self) -> Sequence[str]:
        """The reference answers."""


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """How well one row is answered; `loss` is the sum over its `tokens` answer tokens."""

    loss: float
    tokens: int
    rouge_l: float
    exact_match: float


def score_rows(
    slots: AdapterSlots, rows: Sequence[ScoredRow], section: EvaluationSection
) -> list[RowScores]:
    """Return the scores of every row with the adapter that is installed, or with none."""
    losses = answer_losses(slots, rows, section.batch_size)
    answers = generate_answers(slots, [row.prompt_ids for row in rows], section)
    return [
        RowScores(
            loss=loss,
            tokens=tokens,
            rouge_l=rouge_l(answer, row.references),
            exact_match=exact_match(answer, row.references),
        )
        for row, (loss, tokens), answer in zip(rows, losses, answers, strict=True)
    ]


def answer_losses(
    slots: AdapterSlots, rows: Sequence[TokenRow], batch_size: int
) -> list[tuple[float, int]]:
    """Return (sum of losses, number) of every row's answer tokens, given the right prefix."""
    slots.evaluate()
    found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    lengths = [(len(row.answer_ids), len(row.prompt_ids)) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: (*lengths[place], place))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = collate(
                [rows[place] for place in places],
                loss_on="answer",
                pad_token=slots.pad_token,
                device=slots.device,
            )
            sums = token_losses(slots.model, batch).double().sum(dim=1).tolist()
            counts = batch.counts().tolist()
            for place, loss, count in zip(places, sums, counts, strict=True):
                found[place] = (loss, count)
    return found


def mean_scores(rows: Sequence[RowScores]) -> Scores:
    """Return a client's scores: loss per answer token, the others per row."""
    tokens = sum(row.tokens for row in rows)
    return Scores(
        rows=len(rows),
        loss=sum(row.loss for row in rows) / max(1, tokens),
        rouge_l=sum(row.rouge_l for row in rows) / max(1, len(rows)),
        exact_match=sum(row.exact_match for row in rows) / max(1, len(rows)),
    )
