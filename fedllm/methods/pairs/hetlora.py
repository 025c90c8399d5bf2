"""HetLoRA: factors padded with zeros, weighted by the size of each client's change, truncated.

Cho et al., EMNLP 2024, https://arxiv.org/abs/2401.06432: A = sum_i (|dW_i| / Z) pad(A_i), B the
same, dW_i = s_i B_i A_i, |.| the Frobenius norm, Z the sum of the norms; a client of rank r
receives the first r rows and columns. The norms are those of one module; clients that trained on
no row do not count. The paper's self-pruning, with which clients lower their own rank, is not part
of it.

Directions that no client of the round holds come out as zero in both factors, and could never train
again: they get the seeded rows of A back, which leaves the product as it is.

Legend: G modules, C clients, O out, I in, R rank of the state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Partial, Problem, RankPartition
from fedllm.lora.factors import FactorBlock, ModuleShape, initial_a
from fedllm.methods.pairs.pair_state import PairMethod, summed
from fedllm.methods.protocol import ModuleAggregate, ServerStep


@dataclass(frozen=True, kw_only=True)
class HetLora(PairMethod):
    """The means of padded factors, by the norms of the clients' changes."""

    name: ClassVar[str] = "hetlora"

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i |dW_i| A_i, the same of B, and for each direction the sum of the norms."""
        norms_GC = torch.where(block.weights_GC > 0, _norms(block), 0.0)
        places = range(step.problem.rank)
        reach_CR = torch.tensor(
            [[float(rank > place) for place in places] for rank in block.ranks],
            dtype=torch.float64,
        )
        return {**self.factor_sums(block, step.problem, norms_GC), "norms": norms_GC @ reach_CR}

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the means of the padded factors; where no client changed anything, the state."""
        sums = summed(partials)
        results = []
        for place, (module, state) in enumerate(zip(step.modules, step.before, strict=True)):
            norms_R = sums["norms"][place]
            pair, shares_R = dict(state), torch.ones_like(norms_R)
            if norms_R[0] > 0:
                shares_R = norms_R / norms_R[0]
                pair = {name: sums[name][place] / float(norms_R[0]) for name in "AB"}
                pair["A"] = self._revived(module, pair["A"], shares_R, step.problem)
            results.append(
                self.aggregate_of(place, pair, step, untrained=partial(_diluted, shares_R))
            )
        return results

    def _revived(self, module: str, a_RI: Tensor, shares_R: Tensor, problem: Problem) -> Tensor:
        """Return A with seeded rows where no client holds the direction."""
        lost_R = shares_R == 0
        if not bool(lost_R.any()):
            return a_RI
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        seeded_RI = initial_a(seed=self.seed, module=module, rank=problem.rank, shape=shape)
        return torch.where(lost_R[:, None].to(a_RI.device), seeded_RI.to(a_RI), a_RI)


def _norms(block: FactorBlock) -> Tensor:
    """Return |s_i B_i A_i| (G, C), float64, without forming a product."""
    norms: list[Tensor] = []
    end = 0
    for rank in block.ranks:
        begin, end = end, end + rank
        a_GRI, b_GOR = block.a_GRI[:, begin:end].double(), block.b_GOR[:, :, begin:end].double()
        energies_G = ((b_GOR.mT @ b_GOR) * (a_GRI @ a_GRI.mT)).sum((-2, -1))
        norms.append(energies_G.clamp(min=0.0).sqrt().cpu())
    return torch.stack(norms, dim=1) * block.scales_GC.abs()


def _diluted(shares_R: Tensor, part: RankPartition) -> float:
    """Return what the zeros of those who do not hold a range leave of A times what of B."""
    return float(shares_R[part.begin]) ** 2
