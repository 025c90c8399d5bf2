"""`lora.target_modules` names modules as PEFT does, and no expression takes for ever."""

import re
import time

import pytest

from fedllm.config.target_modules import is_target, target_problem

PATH = "model.language_model.layers.11.self_attn.q_proj"


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj"], True),
        (["self_attn.q_proj"], True),
        ([PATH], True),
        (["proj"], False),
        (["k_proj", "attn.q_proj"], False),
        (".*q_proj", True),
        ("q_proj", False),
        (r".*language_model\..*\.(q_proj|v_proj)", True),
        (".*language_model", False),
        ("all-linear", True),
    ],
)
def test_a_list_names_ends_of_paths_and_an_expression_whole_paths(
    targets: list[str] | str, named: bool
) -> None:
    assert is_target(targets, PATH) is named


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a+)+b", "repeats a group"),
        ("(a|a)*b", "repeats a group"),
        ("([^.]*)*b", "repeats a group"),
        ("(?:a?){9}b", "repeats a group"),
        (".*.*.*.*.*x", "it has 5 of"),
        (".*(q_proj", "not a regular expression"),
        ("*q_proj", "not a regular expression"),
        ("q_proj", r"need a list \(\[q_proj\]\)"),
    ],
)
def test_an_unusable_expression_is_refused(pattern: str, words: str) -> None:
    assert re.search(words, target_problem(pattern))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*language_model\..*\.(q_proj|v_proj)",
        r".*\.(self_attn|mlp)\..*_proj",
        r"model\.layers\.([0-9]|1[0-5])\..*_proj",
        r"(model\.)?layers\.\d+\.mlp\.[a-z_]*",
        r".*?[*+]\*\+q_proj",
        "all-linear",
    ],
)
def test_a_usable_expression_is_accepted(pattern: str) -> None:
    assert target_problem(pattern) == ""


def test_accepted_expressions_end_soon_on_paths_that_do_not_match() -> None:
    assert target_problem(".*.*.*x.*y") == ""
    begun = time.monotonic()
    assert not any(is_target(".*.*.*x.*y", f"{PATH}.{n}") for n in range(50))
    assert time.monotonic() - begun < 30
