"""Scores are those of generated answers, the same in every batch and every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from fedllm.config.models import EvaluationSection
from fedllm.data.cache import AnswerForm, Row
from fedllm.evaluation.answers import generate_answers
from fedllm.evaluation.scores import RowScores, mean_scores, score_rows
from fedllm.lora.factors import Factors
from fedllm.model.base import load_base, load_tokenizer
from fedllm.packing.slots import AdapterSlots
from tests.tiny import Tiny

ROWS = [
    Row(prompt_ids=[5, 6, 7, 8, 9, 10], answer_ids=[71, 72, 1], references=["ab"]),
    Row(prompt_ids=[20, 21], answer_ids=[80, 1], references=["a", "b"]),
    Row(prompt_ids=[30, 31, 32], answer_ids=[90, 91, 92, 93, 1], references=["x y"]),
]
HEAD = list(range(40, 50))
ALIKE = [
    Row(prompt_ids=[*HEAD, 60], answer_ids=[71, 1], references=["ab"]),
    Row(prompt_ids=[*HEAD, 61, 62, 63, 64], answer_ids=[71, 72, 1], references=["c"]),
]
LAYOUTS = ["parts", "mask", "packed", "padded"]


def slots_of(folder: Path, layout: str, target: str, path: str) -> AdapterSlots:
    """Return slots with an adapter of rank 4 on `target`, in each of two layers at `path`."""
    base = load_base(folder, dtype="float32", device="cpu")
    slots = AdapterSlots(base, target_modules=[target], dropout=0.5, layout=layout)
    draws = torch.Generator().manual_seed(0)
    modules = {path.format(n): base.modules[path.format(n)] for n in range(2)}
    slots.install(
        {
            name: Factors(
                a_RI=torch.randn(4, module.in_features, generator=draws),
                b_OR=torch.randn(module.out_features, 4, generator=draws),
                scale=1.0,
            )
            for name, module in modules.items()
        }
    )
    return slots


def llama_slots(tiny: Tiny, layout: str) -> AdapterSlots:
    slots = slots_of(tiny.model, layout, "q_proj", "model.layers.{}.self_attn.q_proj")
    generation: Any = slots.model.generation_config
    generation.repetition_penalty = 5.0  # must not change any answer
    return slots


@pytest.fixture(scope="module")
def slots(tiny: Tiny) -> AdapterSlots:
    return llama_slots(tiny, "padded")


@pytest.fixture(scope="module", params=LAYOUTS)
def in_any_layout(tiny: Tiny, request: pytest.FixtureRequest) -> AdapterSlots:
    return llama_slots(tiny, request.param)


def section(batch_size: int = 16, max_new_tokens: int = 6) -> EvaluationSection:
    return EvaluationSection(batch_size=batch_size, max_new_tokens=max_new_tokens)


def greedy(slots: AdapterSlots, prompt: list[int], most: int) -> list[int]:
    """Return the greedy answer, computed token by token without a cache or a batch."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(slots.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


def answered(slots: AdapterSlots, rows: list[Row]) -> list[Row]:
    """Return the rows with the greedy answers of the model as references."""
    slots.evaluate()
    return [
        Row(
            prompt_ids=row.prompt_ids,
            answer_ids=row.answer_ids,
            references=[
                slots.base.tokenizer.decode(
                    greedy(slots, row.prompt_ids, 6), skip_special_tokens=True
                ).strip()
            ],
        )
        for row in rows
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_are_greedy_in_every_batch(slots: AdapterSlots, batch_size: int) -> None:
    slots.train()
    found = generate_answers(slots, [row.prompt_ids for row in ROWS], section(batch_size))
    generation: Any = slots.model.generation_config
    assert generation.repetition_penalty == 5.0, "the model's own is back"
    slots.evaluate()
    tokenizer = slots.base.tokenizer
    for row, answer in zip(ROWS, found, strict=True):
        expected = tokenizer.decode(greedy(slots, row.prompt_ids, 6), skip_special_tokens=True)
        assert answer == expected.strip()


def test_a_prompt_without_tokens_has_no_answer(slots: AdapterSlots) -> None:
    alone = generate_answers(slots, [[20, 21]], section())
    assert generate_answers(slots, [[], [20, 21]], section(2)) == ["", *alone]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_are_the_same_in_every_layout(
    slots: AdapterSlots, in_any_layout: AdapterSlots, batch_size: int
) -> None:
    clients = [answered(slots, rows) for rows in (ROWS, ALIKE)]
    expected = score_rows(slots, clients, section())
    assert all(row.exact_match == 1.0 for client in expected for row in client)
    in_any_layout.train()
    found = score_rows(in_any_layout, clients, section(batch_size))
    assert [len(rows) for rows in found] == [3, 2]
    for client, others in zip(found, expected, strict=True):
        for row, other in zip(client, others, strict=True):
            assert row.loss == pytest.approx(other.loss, abs=1e-4)
            assert (row.tokens, row.rouge_l, row.exact_match) == (
                other.tokens,
                other.rouge_l,
                other.exact_match,
            )
    assert [row.tokens for row in found[0]] == [3, 2, 5]


def test_a_row_is_scored_by_its_own_answer(
    slots: AdapterSlots, in_any_layout: AdapterSlots
) -> None:
    answers = generate_answers(slots, [row.prompt_ids for row in ROWS], section())
    right = [
        Row(prompt_ids=row.prompt_ids, answer_ids=row.answer_ids, references=["no", answer])
        for row, answer in zip(ROWS, answers, strict=True)
    ]
    found, others = score_rows(in_any_layout, [right, ROWS], section())
    assert [row.exact_match for row in found] == [1.0] * 3
    assert [row.rouge_l for row in found] == [1.0] * 3
    assert [row.loss for row in found] == pytest.approx([row.loss for row in others])


def test_an_answer_ends_where_the_model_says_too(in_any_layout: AdapterSlots) -> None:
    in_any_layout.evaluate()
    tokens = greedy(in_any_layout, ROWS[0].prompt_ids, 6)
    end = tokens[2]
    kept = in_any_layout.base.tokenizer.decode(tokens[: tokens.index(end) + 1]).strip()
    row = Row(prompt_ids=ROWS[0].prompt_ids, answer_ids=[71, 1], references=[kept])
    assert score_rows(in_any_layout, [[row]], section())[0][0].exact_match == 0.0
    generation: Any = in_any_layout.model.generation_config
    generation.eos_token_id = [end]
    try:
        assert score_rows(in_any_layout, [[row]], section())[0][0].exact_match == 1.0
    finally:
        generation.eos_token_id = 1


def test_a_model_that_cannot_share_is_scored_in_padded_batches(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny.model)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, eos_token_id=1
    )
    BloomForCausalLM(config).save_pretrained(tmp_path)
    path = "transformer.h.{}.self_attention.query_key_value"
    slots = slots_of(tmp_path, "padded", "query_key_value", path)
    right = answered(slots, ROWS)
    alone = [score_rows(slots, [[row]], section())[0][0] for row in right]
    for batch_size in (1, 16):
        found, _ = score_rows(slots, [right, ALIKE], section(batch_size))
        assert [row.exact_match for row in found] == [1.0] * 3
        losses = [row.loss for row in found]
        assert losses == pytest.approx([row.loss for row in alone], abs=1e-4)


def test_a_clients_loss_is_the_mean_over_its_tokens() -> None:
    rows = [
        RowScores(loss=2.0, tokens=1, rouge_l=1.0, exact_match=1.0),
        RowScores(loss=4.0, tokens=5, rouge_l=0.5, exact_match=0.0),
    ]
    found = mean_scores(rows)
    assert (found.rows, found.loss, found.rouge_l, found.exact_match) == (2, 1.0, 0.75, 0.5)


def test_an_answer_ends_where_training_ended_it(in_any_layout: AdapterSlots) -> None:
    tokens = greedy(in_any_layout, ROWS[0].prompt_ids, 6)
    end = len(set(tokens)) - 1  # what comes last was not written before
    kept = tokens[: tokens.index(tokens[end])]
    row = replace(ROWS[0], references=[in_any_layout.base.tokenizer.decode(kept).strip()])
    ends = AnswerForm(ends=(tokens[end],))
    assert score_rows(in_any_layout, [[row]], section())[0][0].exact_match == 0.0
    assert score_rows(in_any_layout, [[row]], section(), ends)[0][0].exact_match == 1.0


def test_what_a_template_writes_before_an_answer_is_not_scored(in_any_layout: AdapterSlots) -> None:
    tokens = greedy(in_any_layout, ROWS[0].prompt_ids, 6)
    first, *rest = in_any_layout.base.tokenizer.decode(tokens, skip_special_tokens=True).split()
    row = replace(ROWS[0], references=[" ".join(rest)])
    assert score_rows(in_any_layout, [[row]], section())[0][0].exact_match == 0.0
    form = AnswerForm(leads=(first,))
    assert score_rows(in_any_layout, [[row]], section(), form)[0][0].exact_match == 1.0


def test_of_a_conversation_the_last_answer_is_scored(in_any_layout: AdapterSlots) -> None:
    talk = replace(ROWS[0], prompt_targets=[2, 3])
    found = score_rows(in_any_layout, [[talk], [ROWS[0]]], section())
    assert found[0][0].tokens == found[1][0].tokens
    assert found[0][0].loss == pytest.approx(found[1][0].loss, rel=1e-6)


def test_the_published_rouge_is_that_of_the_likeliest_tokens_along_the_true_answer(
    in_any_layout: AdapterSlots,
) -> None:
    slots, asked = in_any_layout, section(2).model_copy(update={"rougeL_published": True})
    slots.evaluate()
    right = []
    for row in (*ROWS, *ALIKE):
        with torch.no_grad():
            text = torch.tensor([[*row.prompt_ids, *row.answer_ids[:-1]]])
            logits = slots.model(input_ids=text).logits[0, len(row.prompt_ids) - 1 :]
        words = slots.base.tokenizer.decode(logits.argmax(dim=1), skip_special_tokens=True)
        right.append(replace(row, references=[words.strip()]))
    wrong = replace(ROWS[0], references=["not a word of it"])
    found = score_rows(slots, [right[:3], right[3:], [wrong]], asked)
    assert [row.rougeL_published for client in found for row in client] == [1.0] * 5 + [0.0]
    assert mean_scores([*found[0], *found[2]]).rougeL_published == 0.75
    (plain,) = score_rows(slots, [ROWS], section())
    assert {row.rougeL_published for row in plain} == {None}
    assert mean_scores(plain).rougeL_published is None
