"""FedRot-LoRA: the factor mean, of clients' factors that were turned to agree first.

https://arxiv.org/abs/2602.23638: B A = (B Q)(Q^T A) for every orthogonal Q, so clients with near
products may have far factors. Before the mean each client's factors are turned by the Q that brings
Q^T A_i nearest to the last global A in odd rounds, and B_i Q nearest to the last global B in even
ones: A = sum_i p_i Q_i^T A_i, B = sum_i p_i B_i Q_i. That is the orthogonal Procrustes problem:
Q = U V^T, where U S V^T = SVD(A_i A^T), or SVD(B_i^T B).

Legend: G modules, O out, I in, R rank of the state and of every client.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.protocol import ServerStep


@dataclass(frozen=True, kw_only=True)
class FedRot(FactorMean):
    """The mean of every client's A and of every client's B, turned towards the last ones."""

    name: ClassVar[str] = "fedrot"

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i Q_i^T A_i and sum_i n_i B_i Q_i of the block."""
        if set(block.ranks) <= {0, step.problem.rank}:
            block = _turned(block, step)
        return super().fold(block, step)


def _turned(block: FactorBlock, step: ServerStep) -> FactorBlock:
    part = "A" if step.round % 2 else "B"
    last = torch.stack([state[part] for state in step.before]).double()
    a_parts: list[Tensor] = []
    b_parts: list[Tensor] = []
    sizes = [rank for rank in block.ranks if rank]
    a_each = torch.split(block.a_GRI.double(), sizes, 1)
    b_each = torch.split(block.b_GOR.double(), sizes, 2)
    for a_GRI, b_GOR in zip(a_each, b_each, strict=True):
        cross_GRR = a_GRI @ last.mT if part == "A" else b_GOR.mT @ last
        q_GRR = _nearest_orthogonal(cross_GRR)
        a_parts.append(q_GRR.mT @ a_GRI)
        b_parts.append(b_GOR @ q_GRR)
    return replace(block, a_GRI=torch.cat(a_parts, 1), b_GOR=torch.cat(b_parts, 2))


def _nearest_orthogonal(m_GRR: Tensor) -> Tensor:
    """Return the orthogonal Q with the largest trace of Q^T M; I where M is zero."""
    u_GRR, _, vh_GRR = torch.linalg.svd(m_GRR)
    nothing_G11 = ~m_GRR.any(-1).any(-1)[:, None, None]
    return torch.where(nothing_G11, torch.eye(m_GRR.shape[-1]).to(m_GRR), u_GRR @ vh_GRR)
