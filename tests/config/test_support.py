"""The table of what works together is whole, is on the page, and every cell of it is true."""

import ast
from pathlib import Path

import pytest

from fedllm.config.loading import load_config
from fedllm.config.support import (
    FEATURES,
    RULES,
    VALUES,
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
