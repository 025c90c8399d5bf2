"""Sums of products of factors, beside sums of the factors themselves.

Legend: G modules, O out, I in, R stacked rank.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
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
