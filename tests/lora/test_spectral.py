"""Laws of the spectral form: slices, signs, directions that can train."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import AdapterError
from fedllm.lora.factors import ModuleShape, delta, initial_a
from fedllm.lora.spectral import (
    Spectral,
    alive_directions,
    effective_rank,
    energy_left,
    overlap,
    to_factors,
    truncate,
    with_fixed_signs,
    with_live_directions,
)
from tests.lora.adapters import random_factors


def spectral_of(w_OI: Tensor) -> Spectral:
    u, s, vh = torch.linalg.svd(w_OI, full_matrices=False)
    return Spectral(u_OR=u, s_R=s, vh_RI=vh)


def product(spectral: Spectral) -> Tensor:
    return (spectral.u_OR * spectral.s_R) @ spectral.vh_RI


def seeded(shape: ModuleShape, rank: int) -> Tensor:
    return initial_a(seed=0, module="m", rank=rank, shape=shape)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 12),
    in_=st.integers(1, 12),
    inner=st.integers(0, 12),
    data=st.data(),
)
def test_every_direction_lives_and_the_product_stays(
    out: int, in_: int, inner: int, data: st.DataObject
) -> None:
    shape = ModuleShape(out=out, in_=in_)
    rank = data.draw(st.integers(1, shape.largest_rank), label="rank")
    known = data.draw(st.integers(1, shape.largest_rank), label="known triplets")
    factors = random_factors(inner, out=out, in_=in_, rank=inner, dtype=torch.float64)
    start = truncate(spectral_of(delta(factors)), known)

    live = with_live_directions(start, rank=rank, seeded_a=lambda rows: seeded(shape, rows))

    wanted = truncate(start, min(rank, known))
    assert (product(live) - product(wanted)).norm() <= 1e-6 * float(start.s_R[0]) + 1e-12
    assert live.rank == rank
    torch.testing.assert_close(live.vh_RI @ live.vh_RI.mT, torch.eye(rank, dtype=torch.float64))
    dead = live.s_R == 0
    assert not live.u_OR[:, dead].any()
    if bool(dead.any()):
        towards = (live.vh_RI * seeded(shape, rank)).sum(1)[dead]
        assert (towards >= -1e-9).all()


def test_where_all_is_dead_the_seeded_rows_are_left_orthonormal() -> None:
    shape = ModuleShape(out=5, in_=7)
    nothing = Spectral(
        u_OR=torch.zeros(5, 3, dtype=torch.float64),
        s_R=torch.zeros(3, dtype=torch.float64),
        vh_RI=torch.zeros(3, 7, dtype=torch.float64),
    )
    live = with_live_directions(nothing, rank=5, seeded_a=lambda rows: seeded(shape, rows))
    first = seeded(shape, 1)[0].double()
    assert not live.s_R.any()
    torch.testing.assert_close(live.vh_RI[0], first / first.norm())
    torch.testing.assert_close(live.vh_RI @ live.vh_RI.mT, torch.eye(5, dtype=torch.float64))


def test_a_dead_row_does_not_depend_on_the_null_space_of_the_svd() -> None:
    shape = ModuleShape(out=6, in_=8)
    start = spectral_of(delta(random_factors(1, out=6, in_=8, rank=2, dtype=torch.float64)))
    turned = Spectral(
        u_OR=start.u_OR, s_R=start.s_R, vh_RI=torch.cat([start.vh_RI[:2], -start.vh_RI[2:].flip(0)])
    )
    one = with_live_directions(start, rank=4, seeded_a=lambda rows: seeded(shape, rows))
    two = with_live_directions(turned, rank=4, seeded_a=lambda rows: seeded(shape, rows))
    assert torch.equal(one.vh_RI, two.vh_RI)


def test_the_seeded_start_is_drawn_only_where_a_direction_is_dead() -> None:
    def no_draws(rows: int) -> Tensor:
        raise AssertionError(f"{rows} rows drawn")

    start = spectral_of(delta(random_factors(1, out=6, in_=8, rank=3)))
    assert with_live_directions(start, rank=3, seeded_a=no_draws).rank == 3


def test_a_direction_of_a_millionth_is_dead_and_above_it_alive() -> None:
    shape = ModuleShape(out=4, in_=4)
    start = Spectral(
        u_OR=torch.eye(4), s_R=torch.tensor([1.0, 1e-3, 1.1e-6, 0.9e-6]), vh_RI=torch.eye(4)
    )
    live = with_live_directions(start, rank=4, seeded_a=lambda rows: seeded(shape, rows))
    assert live.s_R.tolist() == pytest.approx([1.0, 1e-3, 1.1e-6, 0.0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_signs_are_fixed_and_the_product_is_unchanged(seed: int, rank: int) -> None:
    start = spectral_of(delta(random_factors(seed, out=7, in_=6, rank=rank)))
    flips = torch.randn(6, generator=torch.Generator().manual_seed(seed)).sign().double()
    flipped = Spectral(u_OR=start.u_OR * flips, s_R=start.s_R, vh_RI=start.vh_RI * flips[:, None])
    fixed, again = with_fixed_signs(start), with_fixed_signs(flipped)
    assert torch.equal(fixed.vh_RI, again.vh_RI)
    assert torch.equal(fixed.u_OR, again.u_OR)
    torch.testing.assert_close(product(fixed), product(start))
    largest = fixed.vh_RI.gather(1, fixed.vh_RI.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_the_papers_split_puts_all_of_s_in_b() -> None:
    start = spectral_of(delta(random_factors(4, out=7, in_=6, rank=5)))
    factors = to_factors(start, rank=3, scale=0.25)
    assert torch.equal(factors.a_RI, start.vh_RI[:3])
    torch.testing.assert_close(factors.b_OR.norm(dim=0), start.s_R[:3] * 4)
    torch.testing.assert_close(delta(factors), product(truncate(start, 3)))


def test_a_rank_above_that_of_the_state_is_refused() -> None:
    start = spectral_of(torch.eye(3))
    for rank in (0, 4):
        with pytest.raises(AdapterError, match=f"rank {rank} is above the state's rank 3"):
            truncate(start, rank)


def test_the_energy_left_out_is_the_residual_and_all_smaller_triplets() -> None:
    s = torch.tensor([2.0, 1.0, 0.5])
    assert energy_left(residual_energy=0.75, s_R=s, rank=2) == pytest.approx(1.0)
    assert energy_left(residual_energy=0.75, s_R=s, rank=3) == 0.75
    # far below what a difference of energies could tell
    assert energy_left(residual_energy=1e-30, s_R=s, rank=3) == 1e-30
    assert energy_left(residual_energy=0.0, s_R=torch.zeros(2), rank=1) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda s: sorted(s, reverse=True)),
    st.integers(1, 12),
    st.sampled_from([1.0, 1e-12, 1e12]),
)
def test_the_effective_rank_is_at_most_that_of_the_whole_spectrum(
    values: list[float], kept: int, unit: float
) -> None:
    s = torch.tensor(values, dtype=torch.float64)
    total = float(s.square().sum())
    shares = s.square() / total
    whole = math.exp(-float((shares * shares.log()).sum()))
    assert effective_rank(total_energy=total, s_R=s) == pytest.approx(whole)
    assert 1 - 1e-9 <= whole <= len(values) + 1e-9
    short = effective_rank(total_energy=total, s_R=s[:kept])
    assert short <= whole * (1 + 1e-9)
    assert effective_rank(total_energy=unit**2 * total, s_R=unit * s[:kept]) == pytest.approx(short)


def test_energy_not_computed_counts_as_directions_of_the_last_ones_size() -> None:
    assert effective_rank(total_energy=4.0, s_R=torch.ones(4)) == pytest.approx(4.0)
    # four of eight equal ones: the rest is as it is taken to be
    assert effective_rank(total_energy=8.0, s_R=torch.ones(4)) == pytest.approx(8.0)
    assert effective_rank(total_energy=1.0, s_R=torch.tensor([1.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(total_energy=1.0 - 1e-9, s_R=torch.ones(1)) == pytest.approx(1.0)


def test_no_energy_has_no_effective_rank() -> None:
    assert effective_rank(total_energy=0.0, s_R=torch.zeros(3)) == 0.0


def test_a_direction_too_small_for_a_share_counts_for_nothing() -> None:
    s = torch.tensor([1e100, 1e-100], dtype=torch.float64)
    assert effective_rank(total_energy=1e200, s_R=s) == pytest.approx(1.0)


def test_the_overlap_is_that_of_spaces_not_of_vectors() -> None:
    draws = torch.Generator().manual_seed(0)
    rows, _ = torch.linalg.qr(torch.randn(9, 6, generator=draws, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=draws, dtype=torch.float64))
    one = rows.mT
    assert overlap(one, turn @ one[:3], rank=3) == pytest.approx(1.0)
    assert overlap(one[:3], one[3:], rank=3) == pytest.approx(0.0, abs=1e-12)
    angle = math.pi / 6
    tilted = math.cos(angle) * one[0] + math.sin(angle) * one[5]
    mixed = torch.stack([one[1], tilted])
    assert overlap(one, mixed, rank=2) == pytest.approx((1 + math.cos(angle) ** 2) / 2)
    assert overlap(mixed, one.float(), rank=2) == pytest.approx(overlap(one, mixed, rank=2))


def test_spaces_of_fewer_directions_have_no_overlap() -> None:
    eye = torch.eye(4)
    assert overlap(eye[:1], eye, rank=2) is None
    assert overlap(eye, eye[:1], rank=2) is None
    assert overlap(eye, eye[:0], rank=1) is None


def test_only_directions_that_live_are_compared() -> None:
    spectral = Spectral(u_OR=torch.eye(3), s_R=torch.tensor([2.0, 1e-3, 1e-6]), vh_RI=torch.eye(3))
    assert torch.equal(alive_directions(spectral), torch.eye(3)[:2])
    nothing = Spectral(u_OR=torch.zeros(3, 3), s_R=torch.zeros(3), vh_RI=torch.eye(3))
    assert len(alive_directions(nothing)) == 0
