"""FedEx-LoRA: what the product of the means misses of the mean of products goes into the base.

Singhal et al., ACL 2025, https://arxiv.org/abs/2410.09432: A = sum_i p_i A_i, B = sum_i p_i B_i,
and W_0 <- W_0 + sum_i p_i s B_i A_i - s B A. The model after a round is exactly the mean of the
clients' models.

Legend: O out, I in, R rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.products import split, with_product
from fedllm.methods.protocol import ModuleAggregate, ServerStep
from fedllm.methods.residuals.base_state import ChangesBase, mean_of


@dataclass(frozen=True, kw_only=True)
class FedEx(ChangesBase, FactorMean):
    """The means of A and of B, and the rest of the mean of products in the base."""

    name: ClassVar[str] = "fedex"
    adds_adapter: ClassVar[bool] = True

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i A_i, sum_i n_i B_i and the block's weighted sum of products."""
        return with_product(super().fold(block, step), block, step)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the means, and the residual in the change of the base; diagnostics are of B A."""
        products: list[Partial] = []
        results = super().finish(split(partials, products), step)
        found = []
        for place, result in enumerate(results):
            module = step.modules[place]
            # of the factors as they are carried: the sum is then exact
            rank = step.problem.rank
            pair = self.module_adapter(module=module, state=result.state, rank=rank)
            residual = mean_of(products, place, total=step.total, less=pair)
            change = self.changed(place, residual, step)
            found.append(replace(result, state={**result.state, **change}))
        return found
