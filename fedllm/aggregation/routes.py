"""From a stacked sum of products to its leading singular triplets, by the route its shape asks for.

Legend: O out, I in, R stacked rank, K wanted rank. The sum is `b_OR @ a_RI`.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from fedllm.aggregation.decomposition import Decomposition
from fedllm.aggregation.dense import dense
from fedllm.aggregation.factored import factored
from fedllm.lora.factors import Stacked
from fedllm.lora.spectral import Spectral, with_fixed_signs

Route: TypeAlias = Callable[[Tensor, Tensor, int], Decomposition]

ROUTES: Mapping[str, Route] = {"factored": factored, "dense": dense}


def route_for(*, out: int, in_: int, stacked_rank: int) -> str:
    """Return the name of the route, from shapes alone: a rerun takes the same one."""
    return "factored" if stacked_rank < min(out, in_) else "dense"


def truncated_svd(stacked: Stacked, *, rank: int) -> Decomposition:
    """Return the leading `rank` singular triplets of `b_OR @ a_RI` in float64.

    At most min(rank, O, I, R) triplets, sorted, orthonormal also where singular values are zero,
    with fixed signs; the total energy is that of the whole sum. Singular values and the
    truncated product agree with a dense float64 SVD to 1e-7 of the largest singular value where
    the summands do not cancel. The same bits for the same thread count.
    """
    assert rank >= 1, f"rank {rank}"
    b_OR, a_RI = stacked.b_OR, stacked.a_RI
    out, in_ = b_OR.shape[0], a_RI.shape[1]
    route = ROUTES[route_for(out=out, in_=in_, stacked_rank=stacked.rank)]
    # routes are written for tall weights: the narrow side is the cheap one to factorise
    found = route(b_OR, a_RI, rank) if out >= in_ else _turned(route(a_RI.mT, b_OR.mT, rank))
    return Decomposition(
        spectral=with_fixed_signs(found.spectral),
        total_energy=found.total_energy,
        route=found.route,
    )


def _turned(found: Decomposition) -> Decomposition:
    turned = Spectral(
        u_OR=found.spectral.vh_RI.mT, s_R=found.spectral.s_R, vh_RI=found.spectral.u_OR.mT
    )
    return Decomposition(spectral=turned, total_energy=found.total_energy, route=found.route)
