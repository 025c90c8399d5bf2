"""The list of methods."""

import json

from fedllm.methods.catalog import METHODS
from tests.cli.commands import in_process


def test_every_method_is_listed_with_its_options() -> None:
    lines = in_process("methods").stdout.splitlines()
    for name, entry in METHODS.items():
        assert f"{name}: {entry.summary}" in lines
        (row,) = [line for line in lines if line.startswith(f"{name} ")]
        assert row.endswith(entry.paper)
    found = {each["name"]: each for each in json.loads(in_process("methods", "--json").stdout)}
    assert list(found) == list(METHODS)
    assert found["flexlora"]["options"] == {"truncated": "drop", "frozen_tail": False}
    assert found["factor_mean"]["ranks"] == "one"
    assert found["flora"]["base"] == "changes"
