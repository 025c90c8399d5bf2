"""The JSON schema that editors read: it accepts what fedllm ships and marks a wrong key."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fedllm.config.schema import config_schema
from fedllm.storage.paths import shipped

CONFIGS = sorted(shipped("configs").glob("*.yaml"))


def problems(raw: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(config_schema())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(raw)]


def test_the_shipped_schema_is_that_of_the_models() -> None:
    shipped_schema = json.loads(shipped("configs/schema.json").read_text())
    assert shipped_schema == config_schema(), "write it: make reference"
    jsonschema.Draft202012Validator.check_schema(shipped_schema)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_fit_it_and_name_it_to_editors(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert problems(yaml.safe_load(text)) == []


def test_a_wrong_key_and_a_wrong_value_are_marked() -> None:
    raw = yaml.safe_load(CONFIGS[-1].read_text())
    raw["training"] = {"learning_rat": 1.0}
    raw["rounds"] = 0
    found = "\n".join(problems(raw))
    assert "learning_rat" in found
    assert "$.rounds: 0 is less than the minimum of 1" in found


def test_a_section_may_be_empty() -> None:
    raw = yaml.safe_load(CONFIGS[-1].read_text())
    assert problems({**raw, "training": None}) == []
