"""LoRA-FAIR: the factor mean, with B corrected towards the mean of products.

Bian et al., ICCV 2025, https://arxiv.org/abs/2411.14961: A = sum_i p_i A_i and
B = sum_i p_i B_i + D, where D minimises the distance between s (B + D) A and
dW = sum_i p_i s_i B_i A_i, plus lambda |D|. With squared Frobenius norms, as here, that is a ridge
problem of the state's rank: D = (dW / s - B A) A^T (A A^T + lambda I)^-1.

Legend: G modules, O out, I in, R rank of the state and of every client.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.options import LoraFairOptions
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.pairs.pair_state import summed
from fedllm.methods.products import split, times, with_product
from fedllm.methods.protocol import ModuleAggregate, ServerStep


@dataclass(frozen=True, kw_only=True)
class LoraFair(FactorMean):
    """The mean of every client's A, and the B that brings the product near the mean of products."""

    name: ClassVar[str] = "lora_fair"
    options_class: ClassVar[type[LoraFairOptions]] = LoraFairOptions

    options: LoraFairOptions = field(default_factory=LoraFairOptions)

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i A_i, sum_i n_i B_i and the block's weighted sum of products."""
        return with_product(super().fold(block, step), block, step)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return sum_i p_i A_i and the corrected B; the diagnostics are those of their product."""
        products: list[Partial] = []
        sums = summed(split(partials, products))
        a_GRI, b_GOR = sums["A"] / step.total, sums["B"] / step.total
        wanted_GOR = sum(
            (times(product, a_GRI.mT) for product in products), torch.zeros_like(b_GOR)
        ) / (step.total * self.scale(step.problem.rank))
        gram_GRR = a_GRI @ a_GRI.mT
        ridge_GRR = gram_GRR + self.options.ridge * torch.eye(step.problem.rank).to(gram_GRR)
        # D (A A^T + lambda I) = (dW / s - B A) A^T, transposed
        d_GOR = torch.linalg.solve(ridge_GRR, (wanted_GOR - b_GOR @ gram_GRR).mT).mT
        corrected = {"A": sums["A"], "B": sums["B"] + step.total * d_GOR}
        return super().finish([corrected], step)
