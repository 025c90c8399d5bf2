"""Clients that train some of the R rank-one parts of a pair A, B; the parts are drawn.

Which parts follows from seed, round and client, so that the server knows them without being told.

Legend: G modules, C clients, O out, I in, R rank of the state.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Partial
from fedllm.lora.factors import FactorBlock
from fedllm.methods.local_task import Recipient
from fedllm.methods.pairs.pair_state import PairMethod
from fedllm.methods.protocol import ServerStep
from fedllm.planning.seeding import seed_of


@dataclass(frozen=True, kw_only=True)
class DrawnParts(PairMethod):
    """A method whose clients of rank r train r parts of the state, drawn anew every round."""

    per_client: ClassVar[bool] = True

    def drawn(self, *, rank: int, held: int, to: Recipient) -> Tensor:
        """Return the places of the parts that a client trains, ascending; `held` is R."""
        seed = seed_of(self.seed, self.name, to.round, to.client, held)
        order = torch.randperm(held, generator=torch.Generator().manual_seed(seed))
        return order[:rank].sort().values

    def part_scale(self, *, rank: int, held: int) -> float:
        """Return the scale of a part in the training of a client of `rank`."""
        del rank
        return self.scale(held)

    def part_sums(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sums over the clients that trained a part: n_i A_i, n_i B_i, and n_i (G, R).

        B is brought from what the client's scale makes of it to the state's. Adapters that no
        client of a round has sent are the first parts.
        """
        problem = step.problem
        groups, like = len(block.a_GRI), block.a_GRI.new_zeros((), dtype=torch.float64)
        a_GRI = like.new_zeros(groups, problem.rank, problem.in_)
        b_GOR = like.new_zeros(groups, problem.out, problem.rank)
        reach_GR = like.new_zeros(groups, problem.rank)
        weights_GC, scales_GC = block.weights_GC.to(like), block.scales_GC.to(like)
        end = 0
        for client, rank in enumerate(block.ranks):
            begin, end = end, end + rank
            if not rank:
                continue
            places = self._places(block, client, step).to(a_GRI.device)
            weight_G = weights_GC[:, client]
            own = self.part_scale(rank=rank, held=problem.rank) if step.clients else None
            scaled_G = weight_G * scales_GC[:, client] / (own or self.scale(problem.rank))
            a_GRI[:, places] += weight_G[:, None, None] * block.a_GRI[:, begin:end]
            b_GOR[:, :, places] += scaled_G[:, None, None] * block.b_GOR[:, :, begin:end]
            reach_GR[:, places] += weight_G[:, None]
        return {"A": a_GRI, "B": b_GOR, "reach": reach_GR}

    def _places(self, block: FactorBlock, client: int, step: ServerStep) -> Tensor:
        rank = block.ranks[client]
        if not step.clients:
            return torch.arange(rank)
        to = Recipient(client=step.clients[block.clients[client]], round=step.round)
        return self.drawn(rank=rank, held=step.problem.rank, to=to)
