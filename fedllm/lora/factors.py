"""LoRA factors of one module: their stack and their seeded start.

Legend: O out, I in, R rank. The change of a module is `scale * b_OR @ a_RI`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedllm.errors import AdapterError
from fedllm.planning.seeding import seed_of


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """The shape of a module's weight: `out` rows, `in_` columns."""

    out: int
    in_: int

    @property
    def largest_rank(self) -> int:
        """The smaller side: a product of factors cannot have a higher rank."""
        return min(self.out, self.in_)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """One module's adapter: the change `scale * b_OR @ a_RI`.

    `frozen` is added to it and never trains; only what a client receives may have it.

    Raises:
        AdapterError: the factors are not two matrices of one rank.
    """

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    frozen: "Factors | None" = None

    def __post_init__(self) -> None:
        """Refuse factors that cannot be multiplied."""
        a, b = tuple(self.a_RI.shape), tuple(self.b_OR.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterError(f"A is {a} and B is {b}: want A (rank, in) and B (out, rank)")

    @property
    def rank(self) -> int:
        """The number of directions that the adapter can hold."""
        return self.a_RI.shape[0]

    @property
    def shape(self) -> ModuleShape:
        """The shape of the weight that the adapter changes."""
        return ModuleShape(out=self.b_OR.shape[0], in_=self.a_RI.shape[1])

    @property
    def num_bytes(self) -> int:
        """The memory that all factors take."""
        own = self.a_RI.nbytes + self.b_OR.nbytes
        return own + (self.frozen.num_bytes if self.frozen else 0)

    @property
    def num_values(self) -> int:
        """The number of values of all factors."""
        own = self.a_RI.numel() + self.b_OR.numel()
        return own + (self.frozen.num_values if self.frozen else 0)


Adapter: TypeAlias = Mapping[str, Factors]  # module -> its factors
# a change of the weight itself: one term, or the terms whose sum it is
BaseDelta: TypeAlias = Tensor | Factors | Sequence[Tensor | Factors]


def adapter_bytes(adapter: Adapter) -> int:
    """Return the memory that an adapter's factors take."""
    return sum(factors.num_bytes for factors in adapter.values())


@dataclass(frozen=True, kw_only=True)
class FactorBlock:
    """Factors of some clients for G modules of one shape, side by side in the clients' order.

    `a_GRI` and `b_GOR` hold the factors as the clients sent them; R is the sum of the clients'
    `ranks`. `scales_GC` and `weights_GC` are float64 on the CPU, C clients; the weights are not
    normalised. `clients` are the clients' places in their source, where anyone needs them.
    """

    a_GRI: Tensor
    b_GOR: Tensor
    ranks: tuple[int, ...]
    scales_GC: Tensor
    weights_GC: Tensor
    clients: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A weighted sum of products as one product, `b_OR @ a_RI`, in float64."""

    b_OR: Tensor
    a_RI: Tensor

    @property
    def rank(self) -> int:
        """The sum of the stacked ranks."""
        return self.a_RI.shape[0]


def delta(factors: Factors) -> Tensor:
    """Return the dense change `scale * B A` (O, I) in float64, for merging and for tests."""
    change = factors.scale * (factors.b_OR.double() @ factors.a_RI.double())
    return change + delta(factors.frozen) if factors.frozen else change


def terms_of(change: BaseDelta) -> Sequence[Tensor | Factors]:
    """Return the terms of a change of the weight."""
    return [change] if isinstance(change, Tensor | Factors) else change


def base_delta_of(change: BaseDelta) -> Tensor:
    """Return a change of the weight as one matrix (O, I) in float64."""
    first, *others = (
        delta(term) if isinstance(term, Factors) else term.double() for term in terms_of(change)
    )
    return sum(others, first)


def on_device(term: Tensor | Factors, device: torch.device) -> Tensor | Factors:
    """Return a term of a change on a device, in float32."""
    if isinstance(term, Tensor):
        return term.to(device, torch.float32)
    a_RI, b_OR = (part.to(device, torch.float32) for part in (term.a_RI, term.b_OR))
    return Factors(a_RI=a_RI, b_OR=b_OR, scale=term.scale)


def formed(change: BaseDelta) -> Tensor:
    """Return a change of the weight as one matrix (O, I) in the number format of its terms."""
    first, *others = terms_of(change)
    if not isinstance(first, Factors) and not others:
        return first
    # in place of a matrix of its own
    whole = product_of(first) if isinstance(first, Factors) else first.clone()
    for term in others:
        if isinstance(term, Factors):
            whole.addmm_(term.b_OR, term.a_RI, alpha=term.scale)
        else:
            whole += term
    return whole


def product_of(factors: Factors) -> Tensor:
    """Return the dense change `scale * B A` (O, I) in the number format of the factors."""
    change = factors.b_OR @ factors.a_RI
    return change if factors.scale == 1 else change * factors.scale


def stack(factors: Iterable[Factors], weights: Sequence[float]) -> Stacked:
    """Return `sum_i p_i s_i B_i A_i` as one product, without forming it.

    Each factor carries sqrt(|p_i s_i|), A also the sign of `p_i s_i`. The columns keep the order of
    `factors`: the same order gives the same bits. The sum of float32 products cancels without loss,
    since the stack is float64.

    Raises:
        AdapterError: no factors, shapes that disagree, or NaN or infinity among the values.
    """
    items = list(factors)
    assert len(items) == len(weights), f"{len(items)} adapters, {len(weights)} weights"
    shapes = sorted({(item.shape.out, item.shape.in_) for item in items})
    if len(shapes) != 1:
        raise AdapterError(f"adapters to combine must be for weights of one shape, got {shapes}")
    signed: list[float] = []
    for item, weight in zip(items, weights, strict=True):
        product = weight * item.scale
        signed += [math.copysign(math.sqrt(abs(product)), product)] * item.rank
    signed_R = torch.tensor(signed, dtype=torch.float64, device=items[0].a_RI.device)
    # cat copies, so that scaling in place leaves the adapters as they were
    b_OR = torch.cat([item.b_OR for item in items], dim=1).double().mul_(signed_R.abs())
    a_RI = torch.cat([item.a_RI for item in items], dim=0).double().mul_(signed_R[:, None])
    if not math.isfinite(float(b_OR.sum() + a_RI.sum())):
        raise AdapterError("adapters to combine hold NaN or infinity: leave the broken one out")
    return Stacked(b_OR=b_OR, a_RI=a_RI)


def initial_a(*, seed: int, module: str, rank: int, shape: ModuleShape) -> Tensor:
    """Return the first `rank` rows of the module's one seeded A, float32 (R, I).

    Kaiming-uniform, as PEFT starts A (a = sqrt(5): within 1 / sqrt(in)). The rows are drawn one
    after the other, so row k is the same at every rank: the first rows mean the same for all
    clients.
    """
    draws = torch.Generator().manual_seed(seed_of(seed, "initial A", module))
    bound = 1.0 / math.sqrt(shape.in_)
    rows = [torch.empty(shape.in_).uniform_(-bound, bound, generator=draws) for _ in range(rank)]
    return torch.stack(rows)
