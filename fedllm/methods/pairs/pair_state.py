"""The state of the methods that average factors: one pair A and B for each module.

Legend: G modules, C clients, O out, I in, R rank of the state.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Decomposition, Partial, Problem, RankPartition
from fedllm.aggregation.routes import truncated_svds
from fedllm.config.scales import scale_of
from fedllm.errors import AdapterError
from fedllm.lora.factors import (
    BaseDelta,
    FactorBlock,
    Factors,
    ModuleShape,
    initial_a,
    stack,
)
from fedllm.lora.spectral import alive_directions
from fedllm.methods.diagnostics import diagnose, held_partitions, partition_qualities
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState, ServerStep, StatePart
from fedllm.methods.server_side import ServerSide
from fedllm.methods.state import carried
from fedllm.methods.weights import amounts

_SUMS = torch.float64
_PAIR = ("A", "B")


@dataclass(frozen=True, kw_only=True)
class PairMethod(Method):
    """A method whose state is `A` (R, I) and `B` (O, R), at the scale of a client of rank R.

    A client of rank r receives the first r rows of A and columns of B.
    """

    kind: ClassVar[str] = "lora"
    server_sides: ClassVar[tuple[str, ...]] = ("fedavgm", "fedadam", "fedyogi")

    seed: int
    alpha: float
    scaling: str = "fixed"
    server: ServerSide | None = None

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, StatePart]:
        """Return the shapes of A and B, and of what the server's optimizer keeps of them."""
        pair = {
            "A": StatePart(shape=(rank, shape.in_)),
            "B": StatePart(shape=(shape.out, rank)),
        }
        kept = {f"{kind}_{name}": part for name, part in pair.items() for kind in self._keeps}
        return {**pair, **kept}

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return None: any mix of ranks works."""
        del tier_ranks
        return None

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return no change yet: the seeded A, and B zero."""
        a_RI = initial_a(seed=self.seed, module=module, rank=rank, shape=shape)
        pair = {"A": a_RI, "B": torch.zeros(shape.out, rank)}
        return {**pair, **self._first_kept(pair)}

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the first `rank` directions; B is divided by what the client's scale adds."""
        held = state["A"].shape[0]
        if rank > held:
            raise AdapterError(f"{module}: got rank {rank}, the state has {held}: choose less")
        scale = self.scale(rank)
        b_OR = state["B"][:, :rank] * (self.scale(held) / scale)
        return Factors(a_RI=state["A"][:rank], b_OR=b_OR, scale=scale)

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return n_i."""
        return amounts(rows)

    def base_delta(self, state: ModuleState) -> BaseDelta | None:
        """Return None: the base stays as it is."""
        del state
        return None

    def scale(self, rank: int) -> float:
        """Return the scale of an adapter of `rank`."""
        return scale_of(alpha=self.alpha, scaling=self.scaling, rank=rank)

    def factor_sums(self, block: FactorBlock, problem: Problem, weights_GC: Tensor) -> Partial:
        """Return sum_i w_i A_i and sum_i w_i B_i of a block, float64, padded with zeros.

        B is brought from each client's scale to the state's.

        Raises:
            AdapterError: a client has a higher rank than the state.
        """
        largest = max(block.ranks)
        if largest > problem.rank:
            raise AdapterError(
                f"{self.name} cannot hold an adapter of rank {largest} in a state of rank "
                f"{problem.rank}: ask for {largest}, or use flexlora"
            )
        scaled_GC = weights_GC * block.scales_GC / self.scale(problem.rank)
        return padded_sums(block, problem.rank, of_a_GC=weights_GC, of_b_GC=scaled_GC)

    def aggregate_of(
        self,
        place: int,
        pair: ModuleState,
        step: ServerStep,
        *,
        untrained: Callable[[RankPartition], float],
    ) -> ModuleAggregate:
        """Return a module's new state; the diagnostics are those of the product of its factors.

        Args:
            place: the module's among those of `step`.
            pair: the new A and B.
            step: as in `finish`.
            untrained: what the method multiplies a range of directions by, had nobody trained.
        """
        before, problem, ranks = step.before[place], step.problem, step.ranks
        pair = self._moved(pair, before, step)
        product, product_before = self._products(pair, before)
        return ModuleAggregate(
            state=carried(step.modules[place], pair),
            diagnostics=diagnose(
                product,
                ranks=ranks,
                stacked_rank=problem.rank,
                before=alive_directions(product_before.spectral),
                partitions=partition_qualities(
                    problem,
                    total=step.total,
                    before=self._energies(problem, before),
                    after=self._energies(problem, pair),
                    untrained=untrained,
                ),
                left={r: self._energy(pair, r, problem.rank) for r in ranks if r < problem.rank},
            ),
        )

    @property
    def _keeps(self) -> tuple[str, ...]:
        return self.server.keeps if self.server else ()

    def _first_kept(self, pair: ModuleState) -> ModuleState:
        """Return what the server's optimizer keeps of the first state."""
        if self.server is None:
            return {}
        kept = {name: self.server.start(pair[name]) for name in _PAIR}
        return {f"{kind}_{name}": t for name, each in kept.items() for kind, t in each.items()}

    def _moved(self, pair: ModuleState, before: ModuleState, step: ServerStep) -> ModuleState:
        """Return the state that the server's optimizer makes of the method's A and B.

        A factor that clients do not train in this round, and what is kept of it, stay.
        """
        if self.server is None:
            return pair
        if not step.round:
            return {**pair, **self._first_kept(pair)}
        trained = self.local_task(step.round).trained
        state = dict(before)
        for name in _PAIR:
            if name not in trained:
                state[name] = pair[name]
                continue
            was = {kind: before[f"{kind}_{name}"] for kind in self._keeps}
            state[name], kept = self.server.move(pair[name], before[name], was)
            state |= {f"{kind}_{name}": tensor for kind, tensor in kept.items()}
        return state

    def _products(self, *pairs: ModuleState) -> list[Decomposition]:
        rank = pairs[0]["A"].shape[0]
        factors = [Factors(a_RI=p["A"], b_OR=p["B"], scale=self.scale(rank)) for p in pairs]
        return truncated_svds([stack([each], [1.0]) for each in factors], rank=rank)

    def _energies(self, problem: Problem, pair: ModuleState) -> list[float]:
        return [self._energy(pair, part.begin, part.end) for part in held_partitions(problem)]

    def _energy(self, pair: ModuleState, begin: int, end: int) -> float:
        """Return the energy of the product of some directions alone."""
        a_RI, b_OR = pair["A"][begin:end].double(), pair["B"][:, begin:end].double()
        energy = float(((b_OR.mT @ b_OR) * (a_RI @ a_RI.mT)).sum())
        return max(0.0, energy) * self.scale(pair["A"].shape[0]) ** 2


def padded_sums(block: FactorBlock, rank: int, *, of_a_GC: Tensor, of_b_GC: Tensor) -> Partial:
    """Return sum_i v_i A_i and sum_i w_i B_i of a block, float64, padded with zeros to `rank`."""
    a_GRI = block.a_GRI.new_zeros(len(block.a_GRI), rank, block.a_GRI.shape[2], dtype=_SUMS)
    b_GOR = block.b_GOR.new_zeros(*block.b_GOR.shape[:2], rank, dtype=_SUMS)
    of_a_GC, of_b_GC = of_a_GC.to(a_GRI.device), of_b_GC.to(a_GRI.device)
    end = 0
    for client, own in enumerate(block.ranks):
        begin, end = end, end + own
        if own:
            a_GRI[:, :own] += of_a_GC[:, client, None, None] * block.a_GRI[:, begin:end]
            b_GOR[:, :, :own] += of_b_GC[:, client, None, None] * block.b_GOR[:, :, begin:end]
    return {"A": a_GRI, "B": b_GOR}


def summed(partials: Iterable[Partial]) -> dict[str, Tensor]:
    """Return the sums of the partial results, part by part, in the place of the first ones.

    No block is held while the next one is made.
    """
    blocks = iter(partials)
    sums = dict(next(blocks))
    for block in blocks:
        for name, part in block.items():
            sums[name] += part
        del block, part
    return sums
