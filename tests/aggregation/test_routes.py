"""Every route agrees with a dense float64 SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.aggregation.route_types import Decomposition, Problem
from fedllm.aggregation.routes import route_for, truncated_svd
from fedllm.lora.factors import Factors, Stacked, stack
from fedllm.lora.spectral import Spectral
from tests.lora.adapters import Cohort, cohorts, random_factors


def agrees(found: Decomposition, w_OI: torch.Tensor, size: float, rank: int) -> None:
    """Check the laws of a truncated SVD, relative to the size of the summands."""
    spectral, true_s = found.spectral, torch.linalg.svdvals(w_OI)
    eye = torch.eye(spectral.rank, dtype=torch.float64)
    torch.testing.assert_close(spectral.u_OR.mT @ spectral.u_OR, eye)
    torch.testing.assert_close(spectral.vh_RI @ spectral.vh_RI.mT, eye)
    assert (spectral.s_R >= 0).all()
    assert (spectral.s_R.diff() <= 0).all()
    missing = true_s[spectral.rank :]  # a stack of few ranks has no more triplets to give
    assert rank <= spectral.rank or float(missing.norm()) <= 1e-7 * size
    assert (spectral.s_R - true_s[: spectral.rank]).abs().max() <= 1e-7 * size
    product = (spectral.u_OR * spectral.s_R) @ spectral.vh_RI
    optimal = float(true_s[spectral.rank :].norm())
    assert float((w_OI - product).norm()) <= optimal + 1e-7 * size
    assert found.total_energy == pytest.approx(float(w_OI.square().sum()), abs=1e-12 * size**2)


@settings(max_examples=100, deadline=None)
@given(cohort=cohorts(), data=st.data())
def test_every_truncation_is_optimal(cohort: Cohort, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, cohort.shape.largest_rank), label="rank")
    found = truncated_svd(stack(cohort.factors, cohort.weights), rank=rank)
    agrees(found, cohort.dense(), cohort.size(), rank)


@settings(max_examples=40, deadline=None)
@given(cohort=cohorts(largest_side=12, clients=4), data=st.data())
def test_order_and_grouping_of_clients_change_nothing(cohort: Cohort, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(cohort.factors))), label="order")
    whole = stack(cohort.factors, cohort.weights)
    shuffled = stack([cohort.factors[i] for i in order], [cohort.weights[i] for i in order])
    cut = data.draw(st.integers(1, len(order)), label="first group")
    groups = [stack(cohort.factors[:cut], cohort.weights[:cut])]
    if cut < len(order):
        groups.append(stack(cohort.factors[cut:], cohort.weights[cut:]))
    grouped = stack(
        [Factors(a_RI=part.a_RI, b_OR=part.b_OR, scale=1.0) for part in groups], [1.0] * len(groups)
    )
    rank = cohort.shape.largest_rank
    reference = product(truncated_svd(whole, rank=rank).spectral)
    for other in (shuffled, grouped):
        difference = product(truncated_svd(other, rank=rank).spectral) - reference
        assert float(difference.norm()) <= 1e-9 * cohort.size()


def product(spectral: Spectral) -> torch.Tensor:
    return (spectral.u_OR * spectral.s_R) @ spectral.vh_RI


@pytest.mark.parametrize(("out", "in_"), [(40, 40), (64, 24), (24, 64)])
@pytest.mark.parametrize("stacked_rank", [1, 12, 23, 24, 60])
def test_both_routes_agree_on_all_shapes(out: int, in_: int, stacked_rank: int) -> None:
    factors = random_factors(stacked_rank, out=out, in_=in_, rank=stacked_rank)
    found = truncated_svd(stack([factors], [1.0]), rank=8)
    w_OI = factors.b_OR.double() @ factors.a_RI.double()
    agrees(found, w_OI, float(w_OI.norm()), min(8, stacked_rank))
    assert found.route == ("factored" if stacked_rank < min(out, in_) else "dense")


@pytest.mark.parametrize("stacked_rank", [10, 30])
def test_directions_six_orders_of_magnitude_apart_are_all_found(stacked_rank: int) -> None:
    draws = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, stacked_rank, generator=draws, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(30, stacked_rank, generator=draws, dtype=torch.float64))
    s = torch.logspace(0, -6, stacked_rank, dtype=torch.float64)
    mix = torch.randn(stacked_rank, stacked_rank, generator=draws, dtype=torch.float64)
    # one product written with factors that hide its spectrum
    stacked = Stacked(b_OR=(u * s) @ mix, a_RI=torch.linalg.solve(mix, v.mT))
    found = truncated_svd(stacked, rank=stacked_rank)
    torch.testing.assert_close(found.spectral.s_R, s, rtol=1e-6, atol=0)
    for k in range(stacked_rank):
        assert abs(float(found.spectral.vh_RI[k] @ v[:, k])) == pytest.approx(1.0, abs=1e-6)


def test_clients_of_very_unequal_factors_count_alike() -> None:
    one = random_factors(1, out=30, in_=20, rank=3)
    two = random_factors(2, out=30, in_=20, rank=3)
    lopsided = [
        Factors(a_RI=1e-15 * one.a_RI, b_OR=1e15 * one.b_OR, scale=1.0),
        Factors(a_RI=1e15 * two.a_RI, b_OR=1e-15 * two.b_OR, scale=1.0),
    ]
    found = truncated_svd(stack(lopsided, [0.5, 0.5]), rank=6)
    level = truncated_svd(stack([one, two], [0.5, 0.5]), rank=6)
    torch.testing.assert_close(found.spectral.s_R, level.spectral.s_R, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [2, 9])
def test_adapters_of_zeros_give_zeros_and_no_nan(rank: int) -> None:
    nothing = Factors(a_RI=torch.zeros(rank, 8), b_OR=torch.zeros(9, rank), scale=1.0)
    found = truncated_svd(stack([nothing], [1.0]), rank=2)
    assert found.total_energy == 0.0
    assert not found.spectral.s_R.any()
    assert torch.isfinite(found.spectral.u_OR).all()
    assert torch.isfinite(found.spectral.vh_RI).all()


@pytest.mark.parametrize("size", [1e-19, 1e19])
def test_tiny_and_huge_factors_keep_their_digits(size: float) -> None:
    factors = random_factors(1, out=30, in_=20, rank=4, size=size)
    found = truncated_svd(stack([factors] * 3, [1 / 3] * 3), rank=4)
    true_s = torch.linalg.svdvals(factors.b_OR.double() @ factors.a_RI.double())[:4]
    torch.testing.assert_close(found.spectral.s_R, true_s, rtol=1e-9, atol=0)


def test_the_same_input_gives_the_same_bits() -> None:
    for rank in (8, 40):
        stacked = stack([random_factors(1, out=64, in_=32, rank=rank)], [1.0])
        copy = Stacked(b_OR=stacked.b_OR.clone(), a_RI=stacked.a_RI.clone())
        one, two = truncated_svd(stacked, rank=5), truncated_svd(copy, rank=5)
        assert torch.equal(one.spectral.u_OR, two.spectral.u_OR)
        assert torch.equal(one.spectral.vh_RI, two.spectral.vh_RI)


def test_the_route_follows_from_shapes_alone() -> None:
    assert route_for(Problem(out=256, in_=704, stacked_rank=255, rank=8)) == "factored"
    assert route_for(Problem(out=256, in_=704, stacked_rank=256, rank=8)) == "dense"


@pytest.mark.parametrize("apart", [1e-1, 3e-2, 1e-2])
def test_rounding_of_clients_that_nearly_cancel_counts_as_no_excess(
    apart: float,
) -> None:
    out, in_, rank = 80, 70, 12
    for seed in range(12):
        draws = torch.Generator().manual_seed(seed)
        a = torch.randn(rank, in_, generator=draws, dtype=torch.float64)
        b = torch.randn(out, rank, generator=draws, dtype=torch.float64)
        moved = b + apart * torch.randn(out, rank, generator=draws, dtype=torch.float64)
        stacked = Stacked(b_OR=torch.cat([moved, -b], 1), a_RI=torch.cat([a, a]))
        found = truncated_svd(stacked, rank=rank)
        assert found.route == "factored"
        # the sum has no more triplets: all are found
        assert found.certificate.relative_excess == 0.0
