"""The table of what works together is whole, is on the page, and every cell of it is true."""

import ast
from pathlib import Path

import pytest

from fedllm.config.loading import load_config
from fedllm.config.support import (
    FEATURES,
    RULES,
    VALUES,
    Cell,
    Feature,
    Rule,
    cells,
    rule_of,
    support_table,
)
from fedllm.errors import ConfigError
from fedllm.programs.prepare import prepare
from fedllm.storage.paths import CachePaths
from tests.tiny import Tiny

ROOT = Path(__file__).resolve().parents[2]
REFUSED = [row for row in (*RULES, *FEATURES) if row.refused]


def test_every_cell_has_a_state_and_every_rule_a_cell() -> None:
    used = [rule_of(cell) for cell in cells()]
    assert {id(rule) for rule in used} == {id(rule) for rule in RULES}
    for rule in RULES:
        for name, values in rule.where.items():
            assert set(values) <= set(VALUES[name])


def test_every_feature_has_one_state_with_every_engine() -> None:
    for name in {feature.name for feature in FEATURES}:
        engines = [e for feature in FEATURES if feature.name == name for e in feature.engines]
        assert sorted(engines) == sorted(VALUES["engine"])


def test_the_page_has_the_table() -> None:
    assert support_table() in (ROOT / "docs/training.md").read_text()


@pytest.mark.parametrize("row", [*RULES, *FEATURES], ids=str)
def test_a_row_names_tests_that_exist_or_a_message(row: Rule | Feature) -> None:
    assert bool(row.tests) == (row.state == "tested") or row.message
    assert bool(row.message) == (row.state == "refused")
    for test in row.tests:
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.refused[0])
def test_what_the_table_calls_refused_is_refused_so(tiny: Tiny, row: Rule | Feature) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(load_config(tiny.config, row.refused), CachePaths(root=tiny.cache))
    assert row.message in str(refused.value)


def options_of(cell: Cell) -> list[str]:
    """Options of a run in a cell without a GPU, and with a method of fedllm."""
    training = {
        "plain": [],
        "together": ["clients_per_batch=2"],
        "zero below stage 3": ["engine=zero", "zero.stage=2"],
        "zero stage 3": ["engine=zero", "zero.stage=3"],
    }[cell["engine"]]
    if cell["devices"] == "several CPU processes":
        training = [*training, "processes=2"]
        training += ["engine=zero"] if cell["engine"] == "together" else []
    bits = {"none": "none", "8-bit": "int8", "4-bit (NF4)": "nf4"}[cell["quantisation"]]
    method = {"that keeps the base": "factor_mean", "that changes the base": "fedex"}
    return [
        *(f"training.{option}" for option in training),
        f"training.precision={cell['precision']}",
        f"model.quantization={bits}",
        f"method.name={method[cell['method']]}",
        "clients.tiers.large.ranks=2",
    ]


@pytest.mark.parametrize("engine", VALUES["engine"])
def test_a_cell_is_refused_where_the_table_says_so_and_nowhere_else(
    tiny: Tiny, engine: str
) -> None:
    for cell in cells():
        is_left_out = cell["method"] == "one's own" or "GPU" in cell["devices"]
        # no check tells the two number formats apart
        if cell["engine"] != engine or is_left_out or cell["precision"] == "bfloat16":
            continue
        try:
            prepare(load_config(tiny.config, options_of(cell)), CachePaths(root=tiny.cache))
            said = ""
        except ConfigError as refused:
            said = str(refused)
        assert bool(said) == (rule_of(cell).state == "refused"), (cell, said)
