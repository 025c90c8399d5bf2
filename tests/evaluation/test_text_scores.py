"""A text scores 1 against an equal reference, in any script, and less against others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fedllm.evaluation.text_scores import exact_match, rouge_l, unicode_tokens

TEXTS = ["The cat sat.", "+", "?!", "你好世界", "สวัสดี", "हिन्दी में लिखो", "x² = 4", "naïve café"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_meets_itself_and_no_other(text: str) -> None:
    assert rouge_l(text, [text]) == exact_match(text, [text]) == 1.0
    assert rouge_l("something else", [text]) == exact_match("something else", [text]) == 0.0


@given(st.text(max_size=30))
def test_any_text_meets_itself(text: str) -> None:
    assert rouge_l(text, [text]) == exact_match(text, [text]) == 1.0


def test_two_empty_texts_agree_and_one_does_not() -> None:
    assert rouge_l(" ", [""]) == exact_match("", ["\n"]) == 1.0
    assert rouge_l("word", [""]) == rouge_l("", ["word"]) == 0.0
    assert exact_match("", ["word"]) == 0.0


def test_english_is_scored_as_everywhere() -> None:
    reference, prediction = "The dogs were running home", "a dog runs home"
    usual = RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)
    assert rouge_l(prediction, [reference]) == usual["rougeL"].fmeasure > 0


def test_the_best_reference_counts() -> None:
    assert rouge_l("blue", ["red", "blue"]) == exact_match("blue", ["red", "blue"]) == 1.0


def test_characters_count_in_scripts_without_spaces() -> None:
    assert rouge_l("你好", ["你好世界"]) == pytest.approx(2 * 1.0 * 0.5 / 1.5)


def test_symbols_are_answers() -> None:
    assert rouge_l("-", ["+"]) == exact_match("-", ["+"]) == 0.0


def test_exact_match_folds_case_punctuation_and_space() -> None:
    assert exact_match("  The  Cat.", ["the cat"]) == 1.0
    assert exact_match("the cats", ["the cat"]) == 0.0


def test_tokens_are_words_single_characters_and_symbols() -> None:
    assert unicode_tokens("Naïve 東京へ, हिन्दी!") == ["naïve", "東", "京", "へ", ",", "हिन्दी", "!"]
