"""raFLoRA: every range of directions averaged over the clients whose rank reaches it.

https://arxiv.org/abs/2602.13486: the boundaries are the configured ranks, and
dW = sum over ranges (l, h] of sum_{i: r_i >= h} (n_i / N_h) s_i B_i[:, l:h] A_i[l:h, :],
N_h the sum of n_i over the clients with r_i >= h. A range that no client of the round reaches keeps
its part of the state before. Then U S V^T = SVD(dW), and clients receive what FlexLoRA gives them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.protocol import ModuleAggregate, ServerStep
from fedllm.methods.spectral.spectral_state import SpectralMethod, with_room, with_state
from fedllm.methods.weights import direction_weights


@dataclass(frozen=True, kw_only=True)
class RaFlora(SpectralMethod):
    """The mean of products, range by range of directions."""

    name: ClassVar[str] = "raflora"

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i sum_j (n_i / N_j) s_i b_ij a_ij of the block, j a direction."""
        weights_J = direction_weights(step.problem)
        reached_R = torch.cat([weights_J[:rank] for rank in block.ranks])
        amounts_GC = block.weights_GC * block.scales_GC
        amounts_GR = amounts_GC.repeat_interleave(torch.tensor(block.ranks), dim=1)
        # no weight reaches a direction whose clients all weigh nothing
        amounts_GR = torch.where(reached_R > 0, amounts_GR / reached_R, 0.0)
        return routes.fold_columns(block.b_GOR, block.a_GRI, amounts_GR, with_room(step).problem)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the leading triplets of the sums of the ranges' means, all able to train."""
        unreached_R = (direction_weights(step.problem)[: step.problem.rank] == 0).double()
        step = with_room(step)
        return self.decomposed(
            with_state(partials, step, unreached_R),
            step,
            divisor=1.0,
            untrained=lambda _part: 1.0,
        )
