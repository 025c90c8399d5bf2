"""The search for leading triplets, on spectra of every kind, against dense float64 SVDs.

Legend: G modules, M long side, N narrow side, K wanted rank.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedllm.aggregation.bounds import last_gap_bound, norm_ranges, own_gaps_bound
from fedllm.aggregation.iterative_route import decompose
from fedllm.aggregation.route_types import Decomposition, Problem, Start
from fedllm.aggregation.subspace import gram, orthonormal
from fedllm.errors import AdapterError
from tests.aggregation.processors import pretend

LONG, NARROW, RANK = 640, 520, 40

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "slow": lambda j: j.rsqrt(),
    "harmonic": lambda j: 1 / j,
    "steep": lambda j: torch.exp(-j / 8),
    "steeper": lambda j: torch.exp(-j / 2.5),
    "steepest": lambda j: torch.exp(-j / 1.2),
    "far below": lambda j: torch.where(j <= RANK // 2, 1.0, 1e-4 * j.rsqrt()),
    "floor": lambda j: (1 / j.square() + 1e-3).sqrt(),
    "step": lambda j: torch.where(j <= RANK, 1.0, 0.01),
    "step before": lambda j: torch.where(j <= RANK // 2, 1.0, 0.01),
    "long": lambda j: j**-2.5,
    "two steps": lambda j: torch.where(j <= 4, 300.0, torch.where(j <= RANK, 1.0, 0.02)),
    "low rank": lambda j: torch.where(j <= RANK, 1 / j, 0.0),
    "lower rank": lambda j: torch.where(j <= RANK // 3, 1 / j, 0.0),
    "equal": lambda j: torch.ones_like(j),
    "one": lambda j: torch.where(j == 1, 1.0, 0.0),
    "zero": lambda j: torch.zeros_like(j),
}


def matrix(spectrum: str, *, long: int = LONG, narrow: int = NARROW, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    if spectrum == "normal":
        return torch.randn(long, narrow, generator=draws)
    u = torch.linalg.qr(torch.randn(long, narrow, generator=draws, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(narrow, narrow, generator=draws, dtype=torch.float64)).Q
    s = SPECTRA[spectrum](torch.arange(1, narrow + 1, dtype=torch.float64))
    return ((u * s) @ v.mT).float()


def found_in(
    w_GOI: Tensor, *, tolerance: float = 1e-4, start: Start | None = None, rank: int = RANK
) -> list[Decomposition]:
    problem = Problem(
        out=w_GOI.shape[1], in_=w_GOI.shape[2], stacked_rank=9999, rank=rank, tolerance=tolerance
    )
    return decompose([{"W": w_GOI.clone()}], problem, start or Start())


def holds_its_certificate(found: Decomposition, w_OI: Tensor, tolerance: float) -> None:
    s_N = torch.linalg.svdvals(w_OI.double())
    energy = float(s_N.square().sum())
    rounding = 1e-11 * energy
    best = float(s_N[RANK:].square().sum())
    u, s, vh = (part.double() for part in vars(found.spectral).values())
    left = float((w_OI.double() - (u * s) @ vh).square().sum())
    certificate = found.certificate
    assert left <= (1 + certificate.relative_excess) * best + rounding
    assert certificate.relative_excess <= tolerance
    assert certificate.residual_energy == pytest.approx(left, rel=1e-3, abs=rounding)
    assert found.total_energy == pytest.approx(energy, rel=1e-6)
    eye = torch.eye(RANK, dtype=torch.float64)
    for rows in (u.mT, vh):
        assert float((rows @ rows.mT - eye).abs().max()) < 1e-5


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, amx=request.param)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("spectrum", [*SPECTRA, "normal"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_certificate_holds_on_every_spectrum(spectrum: str, tolerance: float) -> None:
    w_OI = matrix(spectrum)
    (found,) = found_in(w_OI[None], tolerance=tolerance)
    holds_its_certificate(found, w_OI, tolerance)
    if spectrum in ("slow", "harmonic", "long", "two steps", "floor", "normal", "zero"):
        assert found.route == "iterative"
    if spectrum in ("equal", "step before"):  # no gap around the wanted rank
        assert found.route == "dense"
    certain = found.route == "dense"
    assert found.certificate.failure_probability == (0.0 if certain else 1e-6)


@pytest.mark.parametrize("spectrum", ["slow", "harmonic", "steep", "floor", "long"])
def test_the_residual_energy_is_precise_to_a_ten_millionth_of_all(spectrum: str) -> None:
    for seed in range(6):
        long, narrow = [(200, 150), (600, 100), (1500, 60)][seed % 3]
        w_OI = matrix(spectrum, long=long, narrow=narrow, seed=seed)
        (found,) = found_in(w_OI[None], rank=12)
        assert found.route == "iterative"
        u, s, vh = (part.double() for part in vars(found.spectral).values())
        left = float((w_OI.double() - (u * s) @ vh).square().sum())
        assert found.certificate.residual_energy == pytest.approx(
            left, abs=1e-7 * found.total_energy
        )


@pytest.mark.usefixtures("precision")
def test_wide_matrices_and_modules_of_every_kind_side_by_side() -> None:
    kinds = ["normal", "steep", "zero", "harmonic", "equal"]
    w_GOI = torch.stack([matrix(kind, seed=n) for n, kind in enumerate(kinds)])
    for w in (w_GOI, w_GOI.mT.contiguous()):
        for each, w_OI in zip(found_in(w), w, strict=True):
            holds_its_certificate(each, w_OI, 1e-4)


@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e12, 1e18])
def test_the_size_of_the_change_does_not_matter(size: float) -> None:
    w_OI = matrix("harmonic")
    (found,), (same,) = found_in((w_OI * size)[None]), found_in(w_OI[None])
    torch.testing.assert_close(found.spectral.s_R.double() / size, same.spectral.s_R.double())
    assert found.certificate.relative_excess <= 1e-4
    assert found.total_energy == pytest.approx(same.total_energy * size**2, rel=1e-6)


def test_a_sum_that_does_not_fit_float32_is_refused() -> None:
    with pytest.raises(AdapterError, match="does not fit float32"):
        found_in(torch.full((1, LONG, NARROW), math.inf))


def test_a_start_nearby_saves_operations_and_changes_nothing_else() -> None:
    before = matrix("slow")
    now = before + 0.02 * before.norm() / math.sqrt(before.numel()) * matrix("normal", seed=5)
    with FlopCounterMode(display=False) as from_nothing:
        (cold,) = found_in(now[None], tolerance=1e-6)
    (near,) = found_in(before[None])
    start = Start(seed=3, near_GKI=near.spectral.vh_RI[None])
    with FlopCounterMode(display=False) as from_nearby:
        (warm,) = found_in(now[None], tolerance=1e-6, start=start)
    assert from_nearby.get_total_flops() < from_nothing.get_total_flops()
    torch.testing.assert_close(warm.spectral.s_R, cold.spectral.s_R, rtol=1e-4, atol=0)
    # a misleading start costs time, not quality
    away = Start(seed=3, near_GKI=torch.eye(NARROW)[None, :RANK])
    (misled,) = found_in(now[None], tolerance=1e-6, start=away)
    holds_its_certificate(misled, now, 1e-6)


@pytest.mark.parametrize("spectrum", ["normal", "harmonic", "floor", "equal", "one", "zero"])
def test_a_norm_lies_within_every_range_that_is_found_for_it(spectrum: str) -> None:
    w_MN = matrix(spectrum).double()
    basis = torch.linalg.qr(matrix("normal", long=NARROW, narrow=30, seed=9).double()).Q
    beside = w_MN - (w_MN @ basis) @ basis.mT
    norm = float(torch.linalg.matrix_norm(beside, ord=2) ** 2)
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        energy_G = w_MN.square().sum()[None]
        ranges = list(norm_ranges(lambda x: w_MN.mT @ (w_MN @ x), basis[None], energy_G, draws))
        assert len(ranges) > 2
        for found in ranges:
            assert float(found.min_G) <= norm * (1 + 1e-9)
            assert float(found.max_G) >= norm * (1 - 1e-9)
        widths = [float(r.max_G - r.min_G) for r in ranges]
        assert widths[-1] <= 0.1 * norm + 1e-30
        assert widths[-1] <= widths[0]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", ["harmonic", "floor", "steeper", "lower rank", "equal", "one"])
@pytest.mark.parametrize("noise", [None, 0.0, 1e-7, 1e-3])
def test_ranges_include_the_rounding_that_they_are_found_with(
    spectrum: str, noise: float | None, precision: torch.dtype
) -> None:
    """Probes run out of directions: then only rounding is left, with some of the basis in it."""
    long, narrow, aside = 130, 100, 14  # "lower rank" has 13, and nothing but rounding beside them
    for case in range(2):
        w_MN = matrix(spectrum, long=long, narrow=narrow, seed=case)
        basis = matrix("normal", long=narrow, narrow=aside, seed=50 + case).double()
        if noise is not None:  # else the leading vectors are beside it for the most part
            leading = torch.linalg.svd(w_MN.double()).Vh[:aside].mT
            basis = leading + noise * basis
        x_NL = torch.linalg.qr(basis).Q.to(precision)
        q_NL = torch.linalg.qr(x_NL.double()).Q
        beside = w_MN.double() - (w_MN.double() @ q_NL) @ q_NL.mT
        norm = float(torch.linalg.matrix_norm(beside, ord=2) ** 2)
        w_MN = w_MN.to(precision)
        energy_G = w_MN.double().square().sum()[None]
        for seed in range(2):
            draws = torch.Generator().manual_seed(seed)
            ranges = norm_ranges(gram_of(w_MN), x_NL[None], energy_G, draws)
            for found in ranges:
                assert float(found.min_G) <= norm * (1 + 1e-12)
                assert float(found.max_G) >= norm * (1 - 1e-12)
            # no wider than the random probes make it, plus the rounding of |W|
            rounding = 40 * torch.finfo(precision).eps * float(energy_G.sqrt())
            assert math.sqrt(float(found.max_G)) <= 1.05 * math.sqrt(norm) + rounding


def gram_of(w_MN: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_GNP: w_MN.mT @ (w_MN @ x_GNP)


def test_each_bound_holds_for_any_basis() -> None:
    g = matrix("harmonic").double()
    gram_NN = g.mT @ g
    values = torch.linalg.eigvalsh(gram_NN).flip(0)
    draws = torch.Generator().manual_seed(1)
    leading = torch.linalg.eigh(gram_NN).eigenvectors.flip(1)[:, :60]
    for noise in (0.0, 1e-4, 1e-3, 1e-2):
        drawn = torch.randn(NARROW, 60, generator=draws, dtype=torch.float64)
        x = torch.linalg.qr(leading + noise * drawn).Q
        theta, turn = torch.linalg.eigh(x.mT @ gram_NN @ x)
        x, theta = x @ turn.flip(1), theta.flip(0)
        r = gram_NN @ x - x * theta
        r -= x @ (x.mT @ r)
        rest = torch.eye(NARROW, dtype=torch.float64) - x @ x.mT
        norm = torch.linalg.matrix_norm(rest @ gram_NN @ rest, ord=2)
        best = float(values[:RANK].sum())
        for bound in (last_gap_bound, own_gaps_bound):
            found = float(bound(theta[None], (r.mT @ r)[None], norm[None], RANK))
            assert found >= best * (1 - 1e-12)
            assert noise or found <= best * (1 + 1e-12)
    for bound in (last_gap_bound, own_gaps_bound):
        assert bound(theta[None], (r.mT @ r)[None], theta[None, 0], RANK).isinf().all()


def test_bases_are_orthonormal_whatever_the_columns() -> None:
    draws = torch.Generator().manual_seed(2)
    columns = torch.randn(2, 200, 30, generator=draws)
    graded = columns * torch.logspace(0, -12, 30)
    dependent = torch.cat([columns[..., :15], columns[..., :15] + 1e-5 * columns[..., 15:]], -1)
    for x in (columns, graded, dependent, columns[..., :1].expand(-1, -1, 30), 0 * columns):
        basis = orthonormal(x)
        eye = torch.eye(30, dtype=torch.float64)
        products = basis.double().mT @ basis.double()
        assert float((products - eye).abs().max()) < 2e-6
    torch.testing.assert_close(
        gram(graded), graded.double().mT @ graded.double(), rtol=1e-4, atol=1e-4
    )
