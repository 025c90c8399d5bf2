"""Cohorts of adapters drawn by Hypothesis, and the dense float64 sums they are held against."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedllm.lora.factors import Factors, ModuleShape

torch.set_num_threads(1)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Some clients' factors of one module, with weights that sum to 1."""

    factors: list[Factors]
    weights: list[float]

    @property
    def shape(self) -> ModuleShape:
        return self.factors[0].shape

    def dense(self) -> Tensor:
        """The weighted mean of the products, formed in float64."""
        return dense_sum(self.factors, self.weights)

    def size(self) -> float:
        """Return the sum of the summands' norms, the unit of rounding."""
        return sum(
            weight * abs(item.scale) * float(item.b_OR.double().norm() * item.a_RI.double().norm())
            for item, weight in zip(self.factors, self.weights, strict=True)
        )


def dense_sum(factors: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    products = [
        weight * item.scale * (item.b_OR.double() @ item.a_RI.double())
        for item, weight in zip(factors, weights, strict=True)
    ]
    return torch.stack(products).sum(0)


def random_factors(
    seed: int,
    *,
    out: int,
    in_: int,
    rank: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    distinct: int | None = None,
) -> Factors:
    """Return normal factors times `size`; at most `distinct` rows of A are independent."""
    draws = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_, generator=draws, dtype=torch.float64)
    b = torch.randn(out, rank, generator=draws, dtype=torch.float64)
    if distinct is not None:
        a = a[torch.arange(rank) % max(1, distinct)] * (distinct > 0)
    return Factors(a_RI=(size * a).to(dtype), b_OR=(size * b).to(dtype), scale=scale)


@st.composite
def cohorts(draw: st.DrawFn, *, largest_side: int = 20, clients: int = 5) -> Cohort:
    """Clients of mixed ranks, scales, dtypes and sizes; zero, dependent and duplicated ones too."""
    out = draw(st.integers(1, largest_side))
    in_ = draw(st.integers(1, largest_side))
    size = draw(st.sampled_from([1e-9, 1e-3, 1.0, 1e6]))
    count = draw(st.integers(1, clients))
    factors = [
        random_factors(
            draw(st.integers(0, 7)),  # few seeds: duplicated clients happen
            out=out,
            in_=in_,
            rank=draw(st.integers(1, min(out, in_))),
            scale=draw(st.sampled_from([0.1, 1.0, 2.0, 16.0])),
            dtype=draw(st.sampled_from(DTYPES)),
            size=size * draw(st.sampled_from([1.0, 1.0, 1e-4])),
            distinct=draw(st.sampled_from([None, None, 0, 1])),
        )
        for _ in range(count)
    ]
    rows = [draw(st.integers(0, 50)) for _ in range(count - 1)] + [1 + draw(st.integers(0, 50))]
    return Cohort(factors=factors, weights=[n / sum(rows) for n in rows])
