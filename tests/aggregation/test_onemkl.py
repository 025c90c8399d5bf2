"""Products of bfloat16 matrices in float32 against those of float64."""

from threading import Thread

import pytest
import torch
from torch import Tensor

from fedllm.aggregation import onemkl

needed = pytest.mark.skipif(not onemkl.is_there(), reason="this PyTorch has no oneMKL")


def drawn(rows: int, columns: int, *, gap: int = 0, seed: int = 0) -> Tensor:
    """Rows with a gap after each."""
    drawn = torch.randn(rows, columns + gap, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16()[:, :columns]


def difference(w_OI: Tensor, b_OR: Tensor, a_RI: Tensor, before: float = 0.0) -> float:
    exact = b_OR.double() @ a_RI.double() + before
    return float((w_OI.double() - exact).norm() / exact.norm())


def test_pytorch_with_onemkl_has_them() -> None:
    assert onemkl.is_there() == torch.backends.mkl.is_available()


@needed
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(("out", "rank", "in_"), [(1, 1, 1), (70, 3, 130), (600, 1000, 65)])
def test_a_product_is_written_or_added(out: int, rank: int, in_: int, gap: int) -> None:
    b_OR, a_RI = drawn(out, rank, gap=gap), drawn(rank, in_, gap=gap, seed=1)
    w_OI = torch.full((out, in_ + gap), torch.nan)[:, :in_]
    onemkl.add_product(w_OI, b_OR, a_RI, keep=False)
    assert difference(w_OI, b_OR, a_RI) < 1e-6
    w_OI[:] = 3.0
    onemkl.add_product(w_OI, b_OR, a_RI)
    assert difference(w_OI, b_OR, a_RI, before=3.0) < 1e-6


@needed
def test_what_lies_between_rows_is_neither_read_nor_written() -> None:
    whole_b, whole_a, whole_w = (torch.full((40, 60), torch.nan) for _ in range(3))
    whole_b, whole_a = whole_b.bfloat16(), whole_a.bfloat16()
    b_OR, a_RI, w_OI = whole_b[:33, :21], whole_a[:21, :17], whole_w[:33, :17]
    b_OR[:], a_RI[:] = drawn(33, 21), drawn(21, 17, seed=1)
    onemkl.add_product(w_OI, b_OR, a_RI, keep=False)
    assert difference(w_OI, b_OR, a_RI) < 1e-6
    assert whole_w.isnan().sum() == 40 * 60 - 33 * 17


@needed
def test_the_same_bits_from_every_thread_that_uses_as_many() -> None:
    b_OR, a_RI = drawn(700, 300), drawn(300, 500, seed=1)
    products = [torch.empty(700, 500) for _ in range(3)]
    number = torch.get_num_threads()

    def write(w_OI: Tensor) -> None:
        torch.set_num_threads(number)  # a new thread begins with the environment's number
        onemkl.add_product(w_OI, b_OR, a_RI, keep=False)

    threads = [Thread(target=write, args=(w,)) for w in products[1:]]
    write(products[0])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(products[0], other) for other in products)


@needed
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_with_as_many_threads_wherever_matrices_lie(threads: int) -> None:
    b_OR, a_RI = drawn(700, 300), drawn(300, 500, seed=1)
    one, again, elsewhere = (torch.empty(700, 500) for _ in range(3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        onemkl.add_product(one, b_OR, a_RI, keep=False)
        onemkl.add_product(again, b_OR, a_RI, keep=False)
        shifted = torch.empty(3 + a_RI.numel(), dtype=torch.bfloat16)[3:].view_as(a_RI)
        onemkl.add_product(elsewhere, b_OR, shifted.copy_(a_RI), keep=False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, again)
    assert torch.equal(one, elsewhere)


@needed
@pytest.mark.parametrize("wrong", ["dtype", "shape", "layout", "row", "repeated", "nowhere"])
def test_matrices_that_would_be_misread_are_not_read(wrong: str) -> None:
    b_OR, a_RI, w_OI = drawn(5, 4), drawn(4, 6), torch.zeros(5, 6)
    given = {
        "dtype": (w_OI, b_OR.float(), a_RI),
        "shape": (w_OI, b_OR, a_RI[:3]),
        "layout": (w_OI, b_OR, drawn(6, 4).mT),
        "row": (w_OI[:1], drawn(4, 1).mT, a_RI),
        "repeated": (torch.zeros(1, 6).expand(5, 6), b_OR, a_RI),
        "nowhere": (w_OI, b_OR, a_RI.to("meta")),
    }
    with pytest.raises(AssertionError):
        onemkl.add_product(*given[wrong])
