"""Laws of factors, their stack and their start."""

import math

import pytest
import torch
from hypothesis import given, settings

from fedllm.config.scales import scale_of
from fedllm.errors import AdapterError, ConfigError
from fedllm.lora.factors import Factors, ModuleShape, delta, initial_a, stack
from tests.lora.adapters import Cohort, cohorts, random_factors

SHAPE = ModuleShape(out=6, in_=9)


@settings(max_examples=60, deadline=None)
@given(cohorts())
def test_the_stack_is_the_weighted_sum_of_products(cohort: Cohort) -> None:
    stacked = stack(cohort.factors, cohort.weights)
    error = (stacked.b_OR @ stacked.a_RI - cohort.dense()).norm()
    assert stacked.rank == sum(item.rank for item in cohort.factors)
    assert error <= 1e-14 * cohort.size()


def test_a_negative_product_keeps_its_sign() -> None:
    one = random_factors(1, out=6, in_=9, rank=2, scale=-3.0)
    two = random_factors(2, out=6, in_=9, rank=3, scale=2.0)
    stacked = stack([one, two], [0.5, -0.25])
    expected = 0.5 * delta(one) - 0.25 * delta(two)
    torch.testing.assert_close(stacked.b_OR @ stacked.a_RI, expected)


def test_stacking_leaves_the_adapters_as_they_were() -> None:
    only = random_factors(3, out=6, in_=9, rank=2, scale=4.0, dtype=torch.float64)
    before = only.a_RI.clone(), only.b_OR.clone()
    stack([only], [0.5])
    assert torch.equal(only.a_RI, before[0])
    assert torch.equal(only.b_OR, before[1])


def test_adapters_are_read_once_and_in_their_order() -> None:
    parts = [random_factors(seed, out=6, in_=9, rank=seed) for seed in (1, 2, 3)]
    lazily = stack(iter(parts), [0.25] * 3)
    assert torch.equal(lazily.b_OR, stack(parts, [0.25] * 3).b_OR)
    torch.testing.assert_close(lazily.b_OR[:, :1], 0.5 * parts[0].b_OR.double())


def test_factors_of_two_ranks_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"A is \(2, 9\) and B is \(6, 3\)"):
        Factors(a_RI=torch.zeros(2, 9), b_OR=torch.zeros(6, 3), scale=1.0)
    with pytest.raises(AdapterError, match="want A"):
        Factors(a_RI=torch.zeros(2), b_OR=torch.zeros(6, 2), scale=1.0)
    with pytest.raises(AdapterError, match="want A"):
        Factors(a_RI=torch.zeros(2, 9), b_OR=torch.zeros(6), scale=1.0)


def test_adapters_of_two_shapes_are_refused() -> None:
    one = random_factors(1, out=6, in_=9, rank=2)
    two = random_factors(1, out=6, in_=8, rank=2)
    with pytest.raises(AdapterError, match=r"\[\(6, 8\), \(6, 9\)\]"):
        stack([one, two], [0.5, 0.5])
    with pytest.raises(AdapterError, match="one shape"):
        stack([], [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    good = random_factors(1, out=6, in_=9, rank=2)
    broken = Factors(a_RI=good.a_RI.clone(), b_OR=good.b_OR, scale=1.0)
    broken.a_RI[1, 3] = bad
    with pytest.raises(AdapterError, match="NaN or infinity"):
        stack([good, broken], [0.5, 0.5])


def test_the_three_scalings() -> None:
    assert scale_of(alpha=16, scaling="fixed", rank=8) == 2.0
    assert scale_of(alpha=16, scaling="proportional", rank=200) == 2.0
    assert scale_of(alpha=16, scaling="rslora", rank=4) == 8.0
    with pytest.raises(ConfigError, match="fixed, proportional, rslora"):
        scale_of(alpha=16, scaling="linear", rank=4)


def test_a_lower_rank_starts_from_the_first_rows_of_a_higher_one() -> None:
    highest = initial_a(seed=1, module="model.q", rank=37, shape=SHAPE)
    for rank in (1, 2, 16, 17, 36):
        assert torch.equal(
            initial_a(seed=1, module="model.q", rank=rank, shape=SHAPE), highest[:rank]
        )


def test_the_start_belongs_to_the_seed_and_the_module() -> None:
    start = initial_a(seed=1, module="model.q", rank=4, shape=SHAPE)
    assert not torch.equal(start, initial_a(seed=2, module="model.q", rank=4, shape=SHAPE))
    assert not torch.equal(start, initial_a(seed=1, module="model.k", rank=4, shape=SHAPE))
    torch.manual_seed(0)
    assert torch.equal(start, initial_a(seed=1, module="model.q", rank=4, shape=SHAPE))


def test_the_start_is_as_wide_as_peft_makes_it() -> None:
    start = initial_a(seed=5, module="m", rank=64, shape=ModuleShape(out=8, in_=100))
    reference = torch.nn.init.kaiming_uniform_(torch.empty(64, 100), a=math.sqrt(5))
    assert start.dtype == torch.float32
    assert start.abs().max() <= 0.1
    assert float(start.std()) == pytest.approx(float(reference.std()), rel=0.03)


def test_the_smaller_side_bounds_the_rank() -> None:
    assert SHAPE.largest_rank == 6
    assert random_factors(1, out=6, in_=9, rank=2).shape == SHAPE
