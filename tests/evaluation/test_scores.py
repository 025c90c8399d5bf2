"""Scores are those of generated answers, the same whatever was batched together."""

import pytest
import torch

from fedllm.config.models import EvaluationSection
from fedllm.data.cache import Row
from fedllm.evaluation.answers import generate_answers
from fedllm.evaluation.scores import RowScores, answer_losses, mean_scores, score_rows
from fedllm.lora.factors import Factors
from fedllm.model.base import load_base
from fedllm.model.slots import AdapterSlots
from tests.tiny import Tiny

ROWS = [
    Row(prompt_ids=[5, 6, 7, 8, 9, 10], answer_ids=[71, 72, 1], references=["ab"]),
    Row(prompt_ids=[20, 21], answer_ids=[80, 1], references=["a", "b"]),
    Row(prompt_ids=[30, 31, 32], answer_ids=[90, 91, 92, 93, 1], references=["x y"]),
]


@pytest.fixture(scope="module")
def slots(tiny: Tiny) -> AdapterSlots:
    base = load_base(tiny.model, dtype="float32", device="cpu")
    slots = AdapterSlots(base, target_modules=["q_proj"], dropout=0.5)
    draws = torch.Generator().manual_seed(0)
    slots.install(
        {
            f"model.layers.{n}.self_attn.q_proj": Factors(
                a_RI=torch.randn(4, 32, generator=draws),
                b_OR=torch.randn(32, 4, generator=draws),
                scale=1.0,
            )
            for n in range(2)
        }
    )
    return slots


def section(batch_size: int = 16, max_new_tokens: int = 6) -> EvaluationSection:
    return EvaluationSection(batch_size=batch_size, max_new_tokens=max_new_tokens)


def greedy(slots: AdapterSlots, prompt: list[int], most: int) -> list[int]:
    """Token by token, without a cache or a batch."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(slots.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_are_greedy_whatever_shares_a_batch(slots: AdapterSlots, batch_size: int) -> None:
    slots.train()
    found = generate_answers(slots, [row.prompt_ids for row in ROWS], section(batch_size))
    slots.evaluate()
    tokenizer = slots.base.tokenizer
    for row, answer in zip(ROWS, found, strict=True):
        expected = tokenizer.decode(greedy(slots, row.prompt_ids, 6), skip_special_tokens=True)
        assert answer == expected.strip()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_losses_do_not_depend_on_the_batch(slots: AdapterSlots, batch_size: int) -> None:
    whole = answer_losses(slots, ROWS, 16)
    parts = answer_losses(slots, ROWS, batch_size)
    assert [count for _, count in whole] == [3, 2, 5]
    assert [loss for loss, _ in parts] == pytest.approx([loss for loss, _ in whole], abs=1e-4)


def test_a_row_is_scored_by_its_own_answer(slots: AdapterSlots) -> None:
    answers = generate_answers(slots, [row.prompt_ids for row in ROWS], section())
    right = [
        Row(prompt_ids=row.prompt_ids, answer_ids=row.answer_ids, references=["no", answer])
        for row, answer in zip(ROWS, answers, strict=True)
    ]
    found = score_rows(slots, [*right, *ROWS], section())
    assert [row.exact_match for row in found[:3]] == [1.0] * 3
    assert [row.rouge_l for row in found[:3]] == [1.0] * 3
    assert [row.loss for row in found[:3]] == pytest.approx([row.loss for row in found[3:]])


def test_a_clients_loss_is_the_mean_over_its_tokens() -> None:
    rows = [
        RowScores(loss=2.0, tokens=1, rouge_l=1.0, exact_match=1.0),
        RowScores(loss=4.0, tokens=5, rouge_l=0.5, exact_match=0.0),
    ]
    found = mean_scores(rows)
    assert (found.rows, found.loss, found.rouge_l, found.exact_match) == (2, 1.0, 0.75, 0.5)
