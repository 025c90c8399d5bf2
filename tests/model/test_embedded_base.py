"""The embedded base depends only on its recipe, is made once, and encodes every text."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config.models import LoraSection
from fedllm.embedded.embedded_clients import QUESTIONS
from fedllm.embedded.embedded_text import build_tokenizer, document
from fedllm.model.base import describe_base, load_base
from fedllm.model.embedded_base import Recipe, embedded_base, pretrain
from fedllm.storage.paths import CachePaths

SHORT = Recipe(steps=6, rows=4, window=48, hidden=32, intermediate=48)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = CachePaths(root=tmp_path_factory.mktemp("cache"))
    return embedded_base(cache, lambda _line: None, SHORT)


def test_it_is_a_base_like_any_other(made: Path) -> None:
    described = describe_base(made, LoraSection().target_modules)
    base = load_base(made, dtype="float32", device="cpu")
    assert described.fingerprint == base.fingerprint
    assert base.tokenizer.eos_token == "</s>"
    model: Any = base.model
    assert len(base.tokenizer) == model.config.vocab_size


def test_the_same_recipe_gives_the_same_weights(made: Path) -> None:
    torch.manual_seed(99)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = pretrain(SHORT, build_tokenizer()).state_dict()
    first = load_base(made, dtype="float32", device="cpu").model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_made_once_and_reports_its_progress(tmp_path: Path) -> None:
    lines: list[str] = []
    counted: list[tuple[str, int, int]] = []
    cache = CachePaths(root=tmp_path)

    def count(what: str, done: int, total: int) -> None:
        counted.append((what, done, total))

    first = embedded_base(cache, lines.append, SHORT, count=count)
    assert [(done, total) for _, done, total in counted] == [(n, 6) for n in range(1, 7)]
    num_lines = len(lines)
    assert embedded_base(cache, lines.append, SHORT, count=count) == first
    assert (len(lines), len(counted)) == (num_lines, 6)
    assert embedded_base(cache, lines.append, Recipe(**{**vars(SHORT), "seed": 1})) != first


def test_a_letter_is_a_token_and_a_known_word_too() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("France") == ["France"]
    assert tokenizer.tokenize("gim lok") == ["g", "i", "m", "Ġl", "o", "k"]
    assert tokenizer.tokenize("### Response:") == ["###", "ĠResponse", ":"]


@given(st.text())
def test_every_text_survives(text: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_no_question_of_the_embedded_clients_is_in_its_text() -> None:
    draw = random.Random(0)
    text = "\n".join("".join(document(draw)) for _ in range(500))
    assert "### Instruction:" in text
    assert not any(question in text for question in QUESTIONS.values())
