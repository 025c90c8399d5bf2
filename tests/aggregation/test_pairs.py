"""Products of bfloat16 pairs against float64, and the memory that is used again."""

import math
from collections.abc import Sequence
from threading import Thread

import pytest
import torch
from torch import Tensor

from fedllm.aggregation import iterative, onemkl, pairs
from fedllm.aggregation.spares import SPARES, Spares
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors
from tests.aggregation.cohorts import problem_of, product, through
from tests.aggregation.processors import pretend
from tests.lora.adapters import Cohort, random_factors

ERROR = 6e-6  # relative, Frobenius
SIDE = 1024  # from here on pairs pay


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large products are formed of pairs, on any CPU for which PyTorch has oneMKL."""
    if not onemkl.is_there():
        pytest.skip("this PyTorch has no oneMKL")
    pretend(monkeypatch, amx=True)
    assert pairs.are_faster(torch.device("cpu"), SIDE, SIDE)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def folded(b_OR: Tensor, a_RI: Tensor, amounts_R: Tensor) -> Tensor:
    return iterative.fold(b_OR[None], a_RI[None], amounts_R.double()[None])["W"][0]


def error(found: Tensor, b_OR: Tensor, a_RI: Tensor, amounts_R: Tensor) -> float:
    exact = b_OR.double() @ (a_RI.double() * amounts_R.double()[:, None])
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("out", "rank", "in_"), [(SIDE, 1, SIDE), (SIDE + 70, 3, SIDE + 6), (2900, 40, SIDE + 1)]
)
def test_a_product_of_pairs_is_near_that_of_float64(
    out: int, rank: int, in_: int, dtype: torch.dtype
) -> None:
    b_OR, a_RI = drawn(out, rank, dtype=dtype), drawn(rank, in_, seed=1, dtype=dtype)
    amounts_R = torch.linspace(0.5, 200, rank, dtype=torch.float64)
    assert error(folded(b_OR, a_RI, amounts_R), b_OR, a_RI, amounts_R) < ERROR


def test_pairs_lose_less_than_the_resolution_and_float32_less_than_pairs(
    request: pytest.FixtureRequest,
) -> None:
    b_OR, a_RI, amounts_R = drawn(1500, 3000), drawn(3000, SIDE, seed=1), torch.ones(3000)
    single = error(folded(b_OR, a_RI, amounts_R), b_OR, a_RI, amounts_R)
    request.getfixturevalue("paired")
    in_pairs = error(folded(b_OR, a_RI, amounts_R), b_OR, a_RI, amounts_R)
    assert single < in_pairs / 4
    assert in_pairs**2 < pairs.RESOLUTION / 10


@pytest.mark.usefixtures("paired")
def test_the_worst_digits_lose_what_is_said_and_no_more() -> None:
    # as far from bfloat16 numbers as can be, and their lower halves too
    worst = 1 + 254.5 * 2**-16
    b_OR, a_RI = (worst * drawn(*shape).sign() for shape in ((SIDE, 40), (40, SIDE)))
    lost = error(folded(b_OR, a_RI, torch.ones(40)), b_OR, a_RI, torch.ones(40))
    assert 2**-15 / 1.1 < lost < 2**-15
    assert lost**2 < pairs.RESOLUTION


@pytest.mark.usefixtures("paired")
def test_small_products_stay_in_float32() -> None:
    assert not pairs.are_faster(torch.device("cpu"), SIDE - 1, 2 * SIDE)
    b_OR, a_RI = drawn(SIDE - 1, 40), drawn(40, SIDE, seed=1)
    assert torch.equal(folded(b_OR, a_RI, torch.ones(40)), b_OR @ a_RI)


@pytest.mark.usefixtures("paired")
def test_factors_sent_in_bfloat16_come_to_what_they_come_to_in_float32() -> None:
    b_OR, a_RI = (drawn(*shape, dtype=torch.bfloat16) for shape in ((SIDE + 6, 40), (40, SIDE)))
    amounts_R = torch.linspace(0.5, 2, 40)
    assert torch.equal(folded(b_OR, a_RI, amounts_R), folded(b_OR.float(), a_RI.float(), amounts_R))


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize("rank", [1, 9, 16, 31, 100])
def test_what_lay_in_the_memory_before_does_not_matter(rank: int) -> None:
    b_OR, a_RI, amounts_R = drawn(SIDE, rank), drawn(rank, SIDE + 10, seed=1), torch.ones(rank)
    SPARES.keep(folded(b_OR, a_RI, amounts_R))
    for _, memory in SPARES._kept:
        memory.fill_(255)  # NaN
    assert error(folded(b_OR, a_RI, amounts_R), b_OR, a_RI, amounts_R) < ERROR


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("where", ["a", "b", "amounts"])
def test_factors_of_any_size_keep_their_digits(size: float, where: str) -> None:
    sizes = {"a": 1.0, "b": 1.0, "amounts": 1.0, where: size}
    others = [name for name in sizes if name != where]
    sizes[others[0]] = 1 / size
    b_OR, a_RI = sizes["b"] * drawn(SIDE, 9), sizes["a"] * drawn(9, SIDE + 10, seed=1)
    amounts_R = sizes["amounts"] * torch.linspace(1, 2, 9, dtype=torch.float64)
    assert error(folded(b_OR, a_RI, amounts_R), b_OR, a_RI, amounts_R) < ERROR


@pytest.mark.usefixtures("paired")
def test_rows_of_zeros_and_one_large_client_are_summed_as_they_are() -> None:
    b_OR, a_RI = drawn(SIDE, 6), drawn(6, SIDE, seed=1)
    b_OR[:200] = 0
    amounts_R = torch.tensor([0.0, 0.0, 1e-30, 1.0, 1e6, 1.0])
    assert error(folded(b_OR, a_RI, amounts_R), b_OR, a_RI, amounts_R) < ERROR
    assert not folded(torch.zeros(SIDE, 6), a_RI, amounts_R).any()


@pytest.mark.usefixtures("paired")
def test_a_sum_that_does_not_fit_float32_is_refused() -> None:
    sent = Cohort(factors=[random_factors(0, out=SIDE, in_=SIDE, rank=3, size=1e25)], weights=[1.0])
    with pytest.raises(AdapterError, match="does not fit float32"):
        through("iterative", sent, 2)


@pytest.mark.usefixtures("paired")
def test_what_a_fold_comes_to_is_known_without_arithmetic() -> None:
    real = iterative.fold(drawn(1, SIDE, 4), drawn(1, 4, SIDE), torch.ones(1, 4))["W"]
    meta = torch.device("meta")
    b_GOR, a_GRI = torch.empty(1, SIDE, 4, device=meta), torch.empty(1, 4, SIDE, device=meta)
    planned = iterative.fold(b_GOR, a_GRI, torch.ones(1, 4, device=meta))["W"]
    assert (planned.shape, planned.dtype) == (real.shape, real.dtype)


def cohort(power: float, *, out: int, in_: int) -> Cohort:
    factors = []
    for client in range(6):
        item = random_factors(client, out=out, in_=in_, rank=96)
        fall = torch.arange(1, item.rank + 1) ** -power
        factors.append(Factors(a_RI=item.a_RI * fall[:, None], b_OR=item.b_OR, scale=1.0))
    return Cohort(factors=factors, weights=[1.0, 30.0, 2.0, 5.0, 1.0, 0.5])


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize(("out", "in_"), [(SIDE + 100, SIDE), (SIDE, SIDE + 100)])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("rank", [4, 24])
def test_triplets_of_summed_pairs_are_within_the_tolerance_of_the_exact_sum(
    out: int, in_: int, power: float, rank: int
) -> None:
    sent = cohort(power, out=out, in_=in_)
    found = through("iterative", sent, rank, cuts=[4, 2])
    w_OI = sent.dense()
    energy = float(w_OI.square().sum())
    true_s = torch.linalg.svdvals(w_OI)
    optimal = float(true_s[rank:].square().sum())
    left_out = float((w_OI - product(found.spectral)).square().sum())
    excess = found.certificate.relative_excess
    assert found.route == "iterative"
    assert excess <= problem_of(sent, rank).tolerance
    assert left_out <= (1 + excess) * optimal + pairs.RESOLUTION * energy
    assert found.certificate.residual_energy == pytest.approx(left_out, rel=1e-3)
    assert found.total_energy == pytest.approx(energy, rel=1e-5)
    room = math.sqrt(excess * optimal + ERROR**2 * energy)
    assert float((found.spectral.s_R - true_s[:rank]).abs().max()) <= room


@pytest.mark.usefixtures("paired")
@pytest.mark.parametrize("rank", [6, 12])
def test_a_sum_of_lower_rank_than_wanted_is_complete(rank: int) -> None:
    factors = [random_factors(seed, out=SIDE + 20, in_=SIDE, rank=3) for seed in range(2)]
    sent = Cohort(factors=factors, weights=[0.5, 2.0])
    found = through("iterative", sent, rank)
    assert found.certificate.relative_excess == 0
    left = (sent.dense() - product(found.spectral)).norm()
    assert float(left) <= ERROR * sent.size()


@pytest.mark.usefixtures("paired")
def test_the_same_blocks_give_the_same_bits_in_used_memory_too() -> None:
    sent = cohort(1.0, out=SIDE + 100, in_=SIDE)
    one, again = (through("iterative", sent, 8, cuts=[2, 2, 2]) for _ in range(2))
    for _, memory in SPARES._kept:
        memory.fill_(255)
    later = through("iterative", sent, 8, cuts=[2, 2, 2])
    for other in (again, later):
        for name, mine in vars(one.spectral).items():
            assert torch.equal(mine, getattr(other.spectral, name))


# --- memory


def addresses(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_kept_memory_is_given_out_once_and_only_for_what_fits() -> None:
    spares = Spares()
    one, two = spares.empty((30, 10)), spares.empty((2, 40), dtype=torch.bfloat16)
    at = addresses([one, two])
    spares.keep(one, two)
    less, more = spares.empty((20, 10)), spares.empty((1000, 10))
    assert less.shape == (20, 10)
    assert addresses([less]) == addresses([one])
    assert not addresses([more]) & at
    assert not addresses([spares.empty((30, 10))]) & at  # it is in use
    assert addresses([spares.empty((80,), dtype=torch.bfloat16)]) == addresses([two])


def test_threads_do_not_share_memory_and_only_the_last_few_are_kept() -> None:
    spares = Spares()
    kept = [spares.empty((64, 2 + n)) for n in range(30)]
    spares.keep(*kept)
    elsewhere: list[Tensor] = []
    thread = Thread(target=lambda: elsewhere.append(spares.empty((64, 10))))
    thread.start()
    thread.join()
    assert not addresses(elsewhere) & addresses(kept)
    found = [spares.empty((64, 2 + n)) for n in range(30)]
    assert len(addresses(found) & addresses(kept)) == 12


def test_memory_that_fits_nothing_any_more_is_given_back() -> None:
    spares = Spares()
    spares.keep(spares.empty((1000, 1000)))
    for _ in range(11):
        spares.keep(spares.empty((8, 10)))
    assert len(spares._kept) == 2
    spares.keep(spares.empty((8, 10)))
    assert len(spares._kept) == 1
