"""The method in the protocol's docstring is complete, and does what it says."""

import doctest
from typing import Any

import pytest
import torch

from fedllm.lora.factors import delta
from fedllm.methods import protocol
from fedllm.methods.spectral.flexlora import FlexLora
from tests.lora.adapters import dense_sum, random_factors
from tests.methods.aggregating import aggregate, can_train


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the docstring's example defines."""
    assert protocol.__doc__ is not None
    example = doctest.DocTestParser().get_doctest(protocol.__doc__, {}, "example", None, None)
    runner = doctest.DocTestRunner()
    result = runner.run(example, clear_globs=False)
    assert (result.failed, result.attempted > 5) == (0, True)
    return example.globs


def test_the_example_is_the_mean_of_changes_at_any_ranks(names: dict[str, Any]) -> None:
    method = names["MeanOfChanges"](seed=0, alpha=16.0)
    sent = [
        random_factors(seed, out=11, in_=9, rank=rank, scale=16.0 / rank)
        for seed, rank in enumerate((2, 8, 3))
    ]
    found = aggregate(method, sent, [1.0, 3.0, 4.0], [2, 3, 8])
    torch.testing.assert_close(found.state["W"].double(), dense_sum(sent, [1 / 8, 3 / 8, 1 / 2]))
    like = FlexLora(seed=0, alpha=16.0)
    theirs = aggregate(like, sent, [1.0, 3.0, 4.0], [2, 3, 8])
    for rank in (2, 8):
        ours = method.module_adapter(module="m", state=found.state, rank=rank)
        other = like.module_adapter(module="m", state=theirs.state, rank=rank)
        torch.testing.assert_close(delta(ours), delta(other), rtol=1e-4, atol=1e-4)
        can_train(ours)
    assert found.diagnostics.total_energy == pytest.approx(theirs.diagnostics.total_energy)
