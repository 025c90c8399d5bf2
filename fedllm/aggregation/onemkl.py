"""Products of bfloat16 matrices in float32 on CPUs, which PyTorch itself has for GPUs alone.

PyTorch's builds for x86 carry oneMKL, whose documented C interface has them: cblas_gemm_bf16bf16f32
(oneMKL developer reference for C, BLAS-like extensions).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

_ROW_MAJOR, _AS_IT_IS = 101, 111  # CblasRowMajor, CblasNoTrans

_Gemm: TypeAlias = Callable[..., None]


def is_there() -> bool:
    """Say whether this PyTorch has them."""
    return _gemm() is not None


def add_product(w_OI: Tensor, b_OR: Tensor, a_RI: Tensor, *, keep: bool = True) -> None:
    """Add `b @ a` to `w`, or write it there.

    Args:
        w_OI: float32. All three are on the CPU, and the numbers of a row lie side by side.
        b_OR: bfloat16.
        a_RI: bfloat16.
        keep: whether what `w` holds counts.
    """
    (out, rank), in_ = b_OR.shape, a_RI.shape[1]
    assert (a_RI.shape[0], w_OI.shape, w_OI.dtype) == (rank, (out, in_), torch.float32)
    assert {b_OR.dtype, a_RI.dtype} == {torch.bfloat16}
    for each in (w_OI, b_OR, a_RI):
        # of others oneMKL says so, goes on, and leaves what lay there
        assert each.is_cpu
        assert each.stride(1) == 1
        assert each.stride(0) >= max(1, each.shape[1])
    gemm = _gemm()
    assert gemm, "this PyTorch has no oneMKL"
    gemm(
        *(_ROW_MAJOR, _AS_IT_IS, _AS_IT_IS, out, in_, rank),
        *(1.0, b_OR.data_ptr(), b_OR.stride(0), a_RI.data_ptr(), a_RI.stride(0)),
        *(float(keep), w_OI.data_ptr(), w_OI.stride(0)),
    )


@cache
def _gemm() -> _Gemm | None:
    # integers of 8 bytes: a oneMKL of 4-byte ones reads the lower half
    kind, size, number, at = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    matrix = (at, size)
    of_type = ctypes.CFUNCTYPE(
        None, *(kind,) * 3, *(size,) * 3, number, *matrix * 2, number, *matrix
    )
    try:
        # what PyTorch's module depends on is searched too: oneMKL is in it, or beside it
        return of_type(("cblas_gemm_bf16bf16f32", ctypes.CDLL(torch._C.__file__)))
    except AttributeError:
        return None
