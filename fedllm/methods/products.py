"""Sums of products of factors, beside sums of the factors themselves.

Legend: G modules, O out, I in, R stacked rank.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.protocol import ServerStep

_PRODUCT = "product "  # before the names of the parts of a sum of products


def with_product(sums: Partial, block: FactorBlock, step: ServerStep) -> Partial:
    """Return what a block comes to, with its weighted sum of products beside it."""
    product = routes.fold(block, step.problem)
    return {**sums, **{f"{_PRODUCT}{name}": part for name, part in product.items()}}


def split(partials: Iterable[Partial], products: list[Partial]) -> Iterator[Partial]:
    """Yield the blocks without their sums of products, which go to `products`.

    Where the route forms the sum, one product is held; else the factors of all blocks, as FlexLoRA
    holds them.
    """
    for block in partials:
        keep({n.removeprefix(_PRODUCT): p for n, p in block.items() if _PRODUCT in n}, products)
        yield {name: part for name, part in block.items() if _PRODUCT not in name}


def keep(product: Partial, products: list[Partial]) -> None:
    """Add a block's sum of products to those of the blocks before."""
    if "W" in product and products:
        products[0] = {"W": products[0]["W"] + product["W"]}
    else:
        products.append(product)


def times(product: Partial, right_GIR: Tensor) -> Tensor:
    """Return a sum of products times a matrix, float64."""
    if "W" in product:
        return product["W"].double() @ right_GIR
    return product["B"] @ (product["A"] @ right_GIR)


def dense(
    products: Sequence[Partial], place: int, *, total: float, less: Factors | None = None
) -> Tensor:
    """Return the mean of products (O, I) of the module at `place`, without `less`.

    It is one float32 product: a weight that it is added to holds no more digits.
    """
    lefts = [p["B"][place] / total for p in products if "B" in p]
    rights = [p["A"][place] for p in products if "B" in p]
    if less is not None:
        lefts.append(less.b_OR.double() * -less.scale)
        rights.append(less.a_RI.double())
    formed = [(p["W"][place] / total).float() for p in products if "W" in p]
    if not lefts:
        return torch.stack(formed).sum(0) if len(formed) > 1 else formed[0]
    product = torch.cat(lefts, 1).float() @ torch.cat(rights).float()
    for other in formed:
        product += other
    return product
