"""Laws of every route, also on shapes that would not choose it, against dense float64 SVDs.

The energies left out are compared: within the certificate, and within the rounding of the sums
behind a route. `size`, the sum of the summands' norms, is the unit of that rounding.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Decomposition, Problem, Start
from fedllm.aggregation.routes import ROUTES, route_for
from fedllm.lora.factors import Factors, initial_a
from fedllm.lora.spectral import Spectral, with_live_directions
from tests.aggregation.cohorts import (
    block_of,
    blocks_of,
    partials_of,
    problem_of,
    product,
    rounding_of,
    through,
)
from tests.lora.adapters import Cohort, cohorts, dense_sum, random_factors

every_route = pytest.mark.parametrize("name", list(ROUTES))

_OPERATIONS = 64  # roundings that add up, of sums over a few dozen terms


def noise(name: str, size: float) -> float:
    """Return the energy that rounding may misplace."""
    return _OPERATIONS * rounding_of(name) * size**2 + 1e-300


def is_a_truncated_svd(spectral: Spectral, unit: float) -> None:
    """Check order, sign and orthonormality, also where singular values are zero."""
    for tensor in (spectral.u_OR, spectral.s_R, spectral.vh_RI):
        assert torch.isfinite(tensor).all()
    assert (spectral.s_R >= 0).all()
    assert (spectral.s_R.diff() <= 0).all()
    eye = torch.eye(spectral.rank, dtype=torch.float64)
    for rows in (spectral.u_OR.mT.double(), spectral.vh_RI.double()):
        assert float((rows @ rows.mT - eye).abs().max()) <= _OPERATIONS * unit


def agrees(name: str, found: Decomposition, w_OI: Tensor, size: float, rank: int) -> None:
    """Check triplets, energies and certificate against a dense SVD in float64."""
    is_a_truncated_svd(found.spectral, rounding_of(name))
    assert found.spectral.rank <= min(rank, *w_OI.shape)
    slack = noise(name, size)
    true_s = torch.linalg.svdvals(w_OI)
    optimal = float(true_s[rank:].square().sum())
    left_out = float((w_OI - product(found.spectral)).square().sum())
    certificate = found.certificate
    assert certificate.relative_excess >= 0
    assert 0 <= certificate.failure_probability <= 1e-6
    assert left_out <= (1 + certificate.relative_excess) * optimal + slack
    assert certificate.residual_energy == pytest.approx(left_out, abs=slack)
    assert found.total_energy == pytest.approx(float(w_OI.square().sum()), abs=slack)
    # each one, not only their sum: by Weyl, what is left out bounds how far one can be
    room = math.sqrt(certificate.relative_excess * optimal + slack)
    assert float((found.spectral.s_R - true_s[: found.spectral.rank]).abs().max()) <= room


def drawn_rank(data: st.DataObject, cohort: Cohort) -> int:
    return data.draw(st.integers(1, cohort.shape.largest_rank), label="rank")


def drawn_cuts(data: st.DataObject, clients: int) -> list[int]:
    cuts: list[int] = []
    while sum(cuts) < clients:
        cuts.append(data.draw(st.integers(1, clients - sum(cuts)), label="block"))
    return cuts


# --- any cohort: mixed ranks, dtypes and sizes, zero, dependent and duplicated clients


@every_route
@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), data=st.data())
def test_every_route_is_as_good_as_its_certificate_says(
    name: str, cohort: Cohort, data: st.DataObject
) -> None:
    rank = drawn_rank(data, cohort)
    found = through(name, cohort, rank, cuts=drawn_cuts(data, len(cohort.factors)))
    agrees(name, found, cohort.dense(), cohort.size(), rank)


@every_route
@settings(max_examples=40, deadline=None)
@given(cohort=cohorts(largest_side=12), data=st.data())
def test_no_direction_is_dead_whatever_the_route(
    name: str, cohort: Cohort, data: st.DataObject
) -> None:
    rank, shape = drawn_rank(data, cohort), cohort.shape
    found = through(name, cohort, rank).spectral
    live = with_live_directions(
        found, rank=rank, seeded_a=lambda r: initial_a(seed=3, module="m", rank=r, shape=shape)
    )
    assert live.rank == rank
    # all of S is in B: A trains B where S is zero
    assert (live.vh_RI.norm(dim=1) - 1).abs().max() <= _OPERATIONS * rounding_of(name)
    alive = live.s_R > 0
    assert (live.u_OR.norm(dim=0)[alive] - 1).abs().sum() <= _OPERATIONS * rounding_of(name) * rank
    change = float((product(live) - product(found)).norm())
    assert change <= 1e-6 * float(found.s_R[:1]) * math.sqrt(rank) + 1e-300


@every_route
@settings(max_examples=30, deadline=None)
@given(cohort=cohorts(largest_side=12), data=st.data())
def test_blocks_cut_otherwise_agree_and_blocks_cut_alike_agree_bit_for_bit(
    name: str, cohort: Cohort, data: st.DataObject
) -> None:
    full, clients = cohort.shape.largest_rank, len(cohort.factors)
    cuts = drawn_cuts(data, clients)
    one, again = (through(name, cohort, full, cuts=cuts) for _ in range(2))
    assert same_bits(one, again)
    other = through(name, cohort, full, cuts=drawn_cuts(data, clients))
    difference = float((product(one.spectral) - product(other.spectral)).square().sum())
    # both are complete: what differs is what rounding took from each
    assert difference <= 4 * noise(name, cohort.size())


PARTS = ("u_OR", "s_R", "vh_RI")


def same_bits(one: Decomposition, other: Decomposition) -> bool:
    pairs = [
        (getattr(one.spectral, p), getattr(other.spectral, p)) for p in ("u_OR", "s_R", "vh_RI")
    ]
    return (
        all(torch.equal(mine, theirs) for mine, theirs in pairs)
        and one.certificate == other.certificate
        and one.total_energy == other.total_energy
    )


@every_route
@pytest.mark.parametrize(("out", "in_"), [(40, 24), (24, 40)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_modules_side_by_side_are_as_each_alone(name: str, out: int, in_: int, rank: int) -> None:
    modules = [
        Cohort(
            factors=[
                random_factors(10 * m + c, out=out, in_=in_, rank=r, scale=m + 1.0)
                for c, r in enumerate((2, 8, 24))
            ],
            weights=[1.0, 0.5, 2.0],
        )
        for m in range(4)
    ]
    partials = partials_of(name, blocks_of(modules, [2, 1]))
    found = ROUTES[name].decompose(partials, problem_of(modules[0], rank), Start(seed=7))
    assert len(found) == len(modules)
    for each, cohort in zip(found, modules, strict=True):
        agrees(name, each, cohort.dense(), cohort.size(), rank)
        alone = through(name, cohort, rank, cuts=[2, 1])
        energy = float(each.spectral.s_R.double().square().sum())
        slack = noise(name, cohort.size())
        excess = max(each.certificate.relative_excess, alone.certificate.relative_excess)
        assert energy == pytest.approx(
            float(alone.spectral.s_R.double().square().sum()),
            abs=slack + excess * each.certificate.residual_energy,
        )


@every_route
def test_modules_without_energy_or_of_other_sizes_leave_their_neighbours_alone(name: str) -> None:
    modules = [
        Cohort(
            factors=[
                random_factors(c + 3, out=40, in_=24, rank=6, size=size, distinct=distinct)
                for c in range(5)
            ],
            weights=[1.0] * 5,
        )
        for size, distinct in ((1.0, None), (0.0, None), (1e-9, None), (1e9, None), (1.0, 1))
    ]
    partials = partials_of(name, blocks_of(modules, [3, 2]))
    found = ROUTES[name].decompose(partials, problem_of(modules[0], 4), Start(seed=7))
    for each, cohort in zip(found, modules, strict=True):
        agrees(name, each, cohort.dense(), cohort.size(), 4)


# --- seeded cases


def sent(ranks: Sequence[int], *, out: int = 30, in_: int = 20, size: float = 1.0) -> Cohort:
    factors = [
        random_factors(seed, out=out, in_=in_, rank=rank, scale=2.0, size=size)
        for seed, rank in enumerate(ranks)
    ]
    return Cohort(factors=factors, weights=[1.0 / (n + 1) for n in range(len(ranks))])


@every_route
@pytest.mark.parametrize(("out", "in_"), [(30, 20), (20, 30), (24, 24)])
@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([1], id="one column"),
        pytest.param([6], id="one client"),
        pytest.param([20], id="one client of the smaller side"),
        pytest.param([1] * 12, id="columns"),
        pytest.param([1] * 40, id="more columns than sides"),
        pytest.param([1, 2, 20, 20], id="mixed"),
    ],
)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_ranks_from_one_to_the_smaller_side(
    name: str, out: int, in_: int, ranks: list[int], rank: int
) -> None:
    cohort = sent(ranks, out=out, in_=in_)
    agrees(name, through(name, cohort, rank), cohort.dense(), cohort.size(), rank)


@every_route
@pytest.mark.parametrize("size", [1e15, 1e-15])
def test_very_large_and_tiny_factors_keep_their_digits(name: str, size: float) -> None:
    cohort = sent([3, 5, 8], size=size)
    found = through(name, cohort, 6)
    agrees(name, found, cohort.dense(), cohort.size(), 6)
    assert float(found.spectral.s_R[-1]) > 0


@every_route
def test_clients_that_share_their_size_unevenly_count_alike(name: str) -> None:
    level = sent([3, 5])
    one, two = level.factors
    lopsided = [
        Factors(a_RI=1e-15 * one.a_RI, b_OR=1e15 * one.b_OR, scale=one.scale),
        Factors(a_RI=1e15 * two.a_RI, b_OR=1e-15 * two.b_OR, scale=two.scale),
    ]
    uneven = Cohort(factors=lopsided, weights=level.weights)
    agrees(name, through(name, uneven, 6), uneven.dense(), level.size(), 6)


@every_route
@pytest.mark.parametrize("copies", [2, 9])
def test_duplicated_clients_count_as_one_of_their_weight(name: str, copies: int) -> None:
    once = sent([4])
    cohort = Cohort(factors=once.factors * copies, weights=[1.0 / copies] * copies)
    found = through(name, cohort, 6)
    agrees(name, found, once.dense(), once.size(), 6)


@every_route
@pytest.mark.parametrize("distinct", [0, 1, 2])
def test_sums_of_lower_rank_than_wanted_are_complete(name: str, distinct: int) -> None:
    factors = [random_factors(seed, out=30, in_=20, rank=8, distinct=distinct) for seed in range(2)]
    cohort = Cohort(factors=factors, weights=[0.5, 0.5])
    found = through(name, cohort, 10)
    agrees(name, found, cohort.dense(), cohort.size(), 10)
    beyond = found.spectral.s_R[2 * distinct :].double()
    assert float(beyond.square().sum()) <= noise(name, cohort.size())


@every_route
@pytest.mark.parametrize("ranks", [[1], [4, 30]])
def test_no_energy_gives_zeros_and_no_nan(name: str, ranks: list[int]) -> None:
    nothing = [
        Factors(a_RI=torch.zeros(rank, 20), b_OR=torch.zeros(30, rank), scale=2.0) for rank in ranks
    ]
    cohort = Cohort(factors=nothing, weights=[1.0] * len(ranks))
    found = through(name, cohort, 6)
    is_a_truncated_svd(found.spectral, rounding_of(name))
    assert not found.spectral.s_R.any()
    assert (found.total_energy, found.certificate.residual_energy) == (0.0, 0.0)
    assert math.isfinite(found.certificate.relative_excess)


@every_route
@pytest.mark.parametrize("negative", ["weight", "scale"])
def test_opposite_clients_cancel(name: str, negative: str) -> None:
    one, other = sent([4, 3]).factors
    opposite = Factors(a_RI=one.a_RI, b_OR=one.b_OR, scale=-one.scale)
    factors = [one, other, one if negative == "weight" else opposite]
    weights = [2.0, 1.0, -2.0 if negative == "weight" else 2.0]
    size = 5 * sum(float(f.scale * f.b_OR.norm() * f.a_RI.norm()) for f in (one, other))
    cohort = Cohort(factors=factors, weights=weights)
    found = through(name, cohort, 6)
    left = dense_sum([other], [1.0])
    agrees(name, found, left, size, 6)
    assert float((product(found.spectral) - left).norm()) <= math.sqrt(noise(name, size))
    alone = Cohort(factors=[factors[0], factors[2]], weights=[weights[0], weights[2]])
    assert through(name, alone, 6).total_energy <= noise(name, size)


@every_route
@pytest.mark.parametrize("wide", [False, True])
def test_half_precision_is_summed_in_full(name: str, wide: bool) -> None:
    out, in_ = (20, 30) if wide else (30, 20)
    factors = [
        random_factors(seed, out=out, in_=in_, rank=3, dtype=torch.bfloat16) for seed in range(20)
    ]
    cohort = Cohort(factors=factors, weights=[0.05] * 20)
    found = through(name, cohort, 20)
    agrees(name, found, cohort.dense(), cohort.size(), 20)
    widened = [Factors(a_RI=f.a_RI.float(), b_OR=f.b_OR.float(), scale=f.scale) for f in factors]
    full = through(name, Cohort(factors=widened, weights=cohort.weights), 20)
    assert same_bits(found, full)


@every_route
def test_blocks_of_different_types_are_summed_together(name: str) -> None:
    factors = [
        random_factors(seed, out=30, in_=20, rank=4, dtype=dtype)
        for seed, dtype in enumerate((torch.bfloat16, torch.float32, torch.float64))
    ]
    cohort = Cohort(factors=factors, weights=[1.0, 2.0, 3.0])
    found = through(name, cohort, 8, cuts=[1, 1, 1])
    agrees(name, found, cohort.dense(), cohort.size(), 8)


# --- larger modules: those that an iterative route is for


@every_route
def test_blocks_of_thousands_of_ranks_are_summed_whole(name: str) -> None:
    factors = [random_factors(seed, out=8, in_=6, rank=1100) for seed in range(2)]
    cohort = Cohort(factors=factors, weights=[1.0, 3.0])
    agrees(name, through(name, cohort, 4), cohort.dense(), cohort.size(), 4)


def decaying(out: int, in_: int, *, power: float, seed: int = 0) -> Cohort:
    """Clients whose sum has singular values that fall like a power of their number."""
    factors = []
    for client in range(6):
        rank = min(out, in_) // 2
        item = random_factors(seed + client, out=out, in_=in_, rank=rank)
        fall = torch.arange(1, rank + 1) ** -power
        factors.append(Factors(a_RI=item.a_RI * fall[:, None], b_OR=item.b_OR, scale=1.0))
    return Cohort(factors=factors, weights=[1.0] * 6)


@every_route
@pytest.mark.parametrize(("out", "in_"), [(300, 192), (192, 300)])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("rank", [4, 24])
def test_larger_modules_are_within_the_tolerance_asked(
    name: str, out: int, in_: int, power: float, rank: int
) -> None:
    cohort = decaying(out, in_, power=power)
    found = through(name, cohort, rank, cuts=[4, 2])
    agrees(name, found, cohort.dense(), cohort.size(), rank)
    assert found.certificate.relative_excess <= problem_of(cohort, rank).tolerance


@every_route
def test_a_near_start_changes_no_promise(name: str) -> None:
    cohort = decaying(192, 128, power=1.0)
    first = through(name, cohort, 16)
    moved = decaying(192, 128, power=1.0, seed=1)
    for near in (first.spectral.vh_RI, torch.zeros(16, 128), random_rows(16, 128)):
        found = through(name, moved, 16, near=near[None].float())
        agrees(name, found, moved.dense(), moved.size(), 16)


def random_rows(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


# --- the public way


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), data=st.data())
def test_the_route_of_the_shapes_is_taken_divided_by_the_total_with_fixed_signs(
    cohort: Cohort, data: st.DataObject
) -> None:
    rank, total = drawn_rank(data, cohort), data.draw(st.sampled_from([0.25, 1.0, 3.0]))
    problem, blocks = problem_of(cohort, rank), blocks_of([cohort])
    name = route_for(problem)
    (found,) = routes.decompose(
        [routes.fold(block, problem) for block in blocks], problem, total=total
    )
    agrees(name, found, cohort.dense() / total, cohort.size() / total, rank)
    largest = found.spectral.vh_RI.gather(1, found.spectral.vh_RI.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("stacked", [6, 40])
def test_signs_do_not_depend_on_the_signs_of_factors(stacked: int) -> None:
    item = random_factors(1, out=30, in_=20, rank=stacked)
    flipped = Factors(a_RI=-item.a_RI, b_OR=-item.b_OR, scale=1.0)
    problem = Problem(out=30, in_=20, stacked_rank=stacked, rank=3)
    one, other = (
        routes.decompose([routes.fold(block_of([[each]], [1.0]), problem)], problem, total=1.0)[0]
        for each in (item, flipped)
    )
    torch.testing.assert_close(one.spectral.u_OR, other.spectral.u_OR)
    torch.testing.assert_close(one.spectral.vh_RI, other.spectral.vh_RI)
