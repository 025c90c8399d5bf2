"""Scores of rows and clients: answer loss, Rouge-L and exact match of generated answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from fedllm.config.models import EvaluationSection
from fedllm.data.cache import BARE_ANSWERS, AnswerForm
from fedllm.evaluation.answers import (
    Scored,
    answer_texts,
    end_tokens,
    generate_answers,
    ignore_scored,
)
from fedllm.evaluation.decoding import answer_clients
from fedllm.evaluation.reading import answer_losses, num_targets, padded_losses
from fedllm.evaluation.teacher_forced import teacher_forced_tokens
from fedllm.evaluation.text_scores import exact_match, rouge_l
from fedllm.packing.batches import TokenRow
from fedllm.packing.slots import AdapterSlots
from fedllm.storage.records import Scores

_Clients = Sequence[Sequence[TokenRow]]


class ScoredRow(TokenRow, Protocol):
    """Row with the answers that count as correct."""

    @property
    def references(self) -> Sequence[str]:
        """The reference answers."""


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Scores of one row and its generated answer; `loss` is the sum over its `tokens`."""

    loss: float
    tokens: int
    rouge_l: float
    exact_match: float
    answer: str = ""
    rougeL_published: float | None = None


def score_rows(
    slots: AdapterSlots,
    clients: Sequence[Sequence[ScoredRow]],
    section: EvaluationSection,
    form: AnswerForm = BARE_ANSWERS,
    scored: Scored = ignore_scored,
) -> list[list[RowScores]]:
    """Return the scores of every row of every client, with the installed adapter or with none.

    Rows are computed together in the layout of `slots`. The rows of a client share their common
    prefix if that layout allows it. Only the last answer of a conversation is scored. `form` is
    the text around the answers that were trained. `scored` is called with the number of further
    rows, pass by pass.
    """
    losses, answers = _SCORERS[slots.layout](slots, clients, section, form, scored)
    rows = [row for client in clients for row in client]
    published = _published(slots, clients, section, form)
    scores = iter(
        RowScores(
            loss=loss,
            tokens=num_targets(row),
            rouge_l=rouge_l(answer, row.references),
            exact_match=exact_match(answer, row.references),
            answer=answer,
            rougeL_published=forced,
        )
        for row, loss, answer, forced in zip(rows, losses, answers, published, strict=True)
    )
    return [list(islice(scores, len(client))) for client in clients]


def mean_scores(rows: Sequence[RowScores]) -> Scores:
    """Return a client's mean scores: the loss per answer token, the others per row."""
    tokens = sum(row.tokens for row in rows)
    published = [row.rougeL_published for row in rows if row.rougeL_published is not None]
    return Scores(
        rows=len(rows),
        loss=sum(row.loss for row in rows) / max(1, tokens),
        rouge_l=sum(row.rouge_l for row in rows) / max(1, len(rows)),
        exact_match=sum(row.exact_match for row in rows) / max(1, len(rows)),
        rougeL_published=sum(published) / len(published) if published else None,
    )


def _published(
    slots: AdapterSlots,
    clients: Sequence[Sequence[ScoredRow]],
    section: EvaluationSection,
    form: AnswerForm,
) -> list[float | None]:
    """Return the Rouge-L of every row's teacher-forced answer, or None if it is not asked for."""
    rows = [row for client in clients for row in client]
    if not section.rougeL_published:
        return [None] * len(rows)
    tokens = teacher_forced_tokens(slots, clients, section.batch_size)
    texts = answer_texts(slots, tokens, form)
    return [rouge_l(text, row.references) for text, row in zip(texts, rows, strict=True)]


def _score_shared(
    slots: AdapterSlots,
    clients: _Clients,
    section: EvaluationSection,
    form: AnswerForm,
    scored: Scored,
) -> tuple[list[float], list[str]]:
    answered = answer_clients(
        slots,
        clients,
        layout=slots.layout,
        batch_size=section.batch_size,
        max_tokens=section.max_new_tokens,
        ends=end_tokens(slots, form),
        scored=scored,
    )
    return [row.loss for row in answered], answer_texts(
        slots, [row.tokens for row in answered], form
    )


def _score_packed(
    slots: AdapterSlots,
    clients: _Clients,
    section: EvaluationSection,
    form: AnswerForm,
    scored: Scored,
) -> tuple[list[float], list[str]]:
    losses = answer_losses(slots, clients, layout="packed", batch_size=section.batch_size)
    return losses, _generated(slots, clients, section, form, scored)


def _score_padded(
    slots: AdapterSlots,
    clients: _Clients,
    section: EvaluationSection,
    form: AnswerForm,
    scored: Scored,
) -> tuple[list[float], list[str]]:
    rows = [row for client in clients for row in client]
    losses = padded_losses(slots, rows, section.batch_size)
    return losses, _generated(slots, clients, section, form, scored)


def _generated(
    slots: AdapterSlots,
    clients: _Clients,
    section: EvaluationSection,
    form: AnswerForm,
    scored: Scored,
) -> list[str]:
    prompts = [row.prompt_ids for client in clients for row in client]
    return generate_answers(slots, prompts, section, form, scored)


# per layout: the summed loss of every row's answer, and the answer that the model writes
_Scorer = Callable[
    [AdapterSlots, _Clients, EvaluationSection, AnswerForm, Scored],
    tuple[list[float], list[str]],
]
_SCORERS: Mapping[str, _Scorer] = {
    "parts": _score_shared,
    "flex": _score_shared,
    "mask": _score_shared,
    "packed": _score_packed,
    "padded": _score_padded,
}
