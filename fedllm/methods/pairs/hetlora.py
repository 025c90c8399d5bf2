"""HetLoRA: factors padded with zeros, weighted by the size of each client's change, truncated.

Cho et al., EMNLP 2024, https://arxiv.org/abs/2401.06432: A = sum_i (|dW_i| / Z) pad(A_i), B the
same, dW_i = s_i B_i A_i, |.| the Frobenius norm, Z the sum of the norms; a client of rank r
receives the first r rows and columns. The norms are those of one module; clients that trained on
no row do not count.

With `pruning` gamma below 1 clients prune themselves. `penalty` lambda adds
lambda |B_i[:, k:]| |A_i[k:]| to the loss, k = max(1, floor(gamma r_i)). A client whose product of
these norms is smaller after its training than before sends zeros there, and has rank k in this
module from its next round on. Ranks of clients are part of the state (`assigned` in
`aggregate.json`); evaluations keep those of the tiers.

Directions that no client of the round holds come out as zero in both factors, and could never train
again: they get the seeded rows of A back, which leaves the product as it is.

Legend: G modules, C clients, O out, I in, R rank of the state.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Partial, Problem, RankPartition
from fedllm.lora.factors import Adapter, FactorBlock, Factors, ModuleShape, initial_a
from fedllm.methods.local_task import LocalTask
from fedllm.methods.options import HetLoraOptions
from fedllm.methods.pairs.pair_state import PairMethod, summed
from fedllm.methods.protocol import ModuleAggregate, ServerStep, StateNotes, UsedClients

_RANKS = "ranks"  # in notes: module -> rank, of the state by client


@dataclass(frozen=True, kw_only=True)
class HetLora(PairMethod):
    """The means of padded factors, by the norms of the clients' changes."""

    name: ClassVar[str] = "hetlora"
    options_class: ClassVar[type[HetLoraOptions]] = HetLoraOptions

    options: HetLoraOptions = field(default_factory=HetLoraOptions)

    def local_task(self, round_number: int) -> LocalTask:
        """Return both factors, with a penalty of the last directions where clients prune."""
        del round_number
        if not self._prunes:
            return LocalTask()
        return LocalTask(tail_penalty=self.options.penalty, tail_share=self.options.pruning)

    def client_notes(self, *, trained: Adapter, received: Callable[[], Adapter]) -> StateNotes:
        """Return the ranks to which a client prunes itself, by module."""
        if not self._prunes:
            return {}
        begun = received()
        task = self.local_task(0)
        pruned = {
            module: task.leading(own.rank)
            for module, own in trained.items()
            if 0 < _tail(own, task) < _tail(begun[module], task)
        }
        return {_RANKS: pruned} if pruned else {}

    def sent(self, *, module: str, trained: Factors, notes: StateNotes) -> Factors:
        """Return the factors with zeros in the pruned directions."""
        kept = notes.get(_RANKS, {}).get(module)
        if kept is None:
            return trained
        a_RI, b_OR = trained.a_RI.clone(), trained.b_OR.clone()
        a_RI[kept:] = 0.0
        b_OR[:, kept:] = 0.0
        return replace(trained, a_RI=a_RI, b_OR=b_OR)

    def next_notes(self, before: StateNotes, used: UsedClients) -> StateNotes:
        """Return the ranks of the clients that pruned themselves, in this round or before."""
        if not self._prunes:
            return before
        ranks = {client: dict(own) for client, own in before.get(_RANKS, {}).items()}
        for client, held, told in zip(used.clients, used.ranks, used.notes, strict=True):
            for module, rank in told.get(_RANKS, {}).items():
                # one step down from the rank that it trained, whatever it says
                lowest = self.local_task(0).leading(held[module])
                ranks.setdefault(client, {})[module] = max(lowest, min(int(rank), held[module]))
        return {_RANKS: ranks}

    def assign(
        self, *, notes: StateNotes, client: str, ranks: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the ranks that a client has pruned itself to, else those of its tier."""
        own = notes.get(_RANKS, {}).get(client)
        return {m: min(rank, own.get(m, rank)) for m, rank in ranks.items()} if own else ranks

    @property
    def _prunes(self) -> bool:
        return self.options.pruning < 1

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
        # clients that prune themselves send zeros
        lost_R = (shares_R == 0).to(a_RI.device) | ((a_RI == 0).all(1) if self._prunes else False)
        if not bool(lost_R.any()):
            return a_RI
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        seeded_RI = initial_a(seed=self.seed, module=module, rank=problem.rank, shape=shape)
        return torch.where(lost_R[:, None].to(a_RI.device), seeded_RI.to(a_RI), a_RI)


def _tail(factors: Factors, task: LocalTask) -> float:
    """Return |B[:, k:]| |A[k:]|, the directions that pruning drops."""
    begin = task.leading(factors.rank)
    return float(factors.b_OR[:, begin:].norm() * factors.a_RI[begin:].norm())


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
