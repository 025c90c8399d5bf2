"""FlexLoRA: weighted mean of full-size products, SVD, every client its own rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, https://arxiv.org/abs/2402.11505: dW = sum_i (n_i / n) s_i B_i A_i,
U S V^T = SVD(dW), and a client of rank r receives A = V_r^T, B = U_r diag(S_r) / s_r.

With `truncated: keep` directions that a client did not receive count as unchanged instead of zero:
dW' = dW + sum_i p_i (W - W_{r_i}), W the state before the round and W_r its truncation. The second
sum is U diag(S_j (1 - P_j)) V^T, P_j the share of the weight of the clients with r_i >= j.

Legend: G modules, K triplets, O out, I in, R rank of the state (the largest that anyone needs).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation import routes
from fedllm.aggregation.decomposition import Decomposition, Partial, Problem, Start
from fedllm.errors import AdapterError
from fedllm.lora.factors import FactorBlock, Factors, ModuleShape, initial_a, scale_of
from fedllm.lora.spectral import Spectral, alive_directions, to_factors, with_live_directions
from fedllm.methods.diagnostics import diagnose, partition_qualities
from fedllm.methods.options import FlexLoraOptions
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState
from fedllm.methods.state import carried
from fedllm.methods.weights import amounts, direction_weights
from fedllm.planning.seeding import seed_of


@dataclass(frozen=True, kw_only=True)
class FlexLora(Method):
    """The state is spectral, `U` (O, R), `S` (R,) and `Vh` (R, I): any rank is a slice of it."""

    kind: ClassVar[str] = "lora"
    name: ClassVar[str] = "flexlora"
    options_class: ClassVar[type[FlexLoraOptions]] = FlexLoraOptions

    seed: int
    alpha: float
    scaling: str = "fixed"
    options: FlexLoraOptions = field(default_factory=FlexLoraOptions)

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of U, S and Vh."""
        return {"U": (shape.out, rank), "S": (rank,), "Vh": (rank, shape.in_)}

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return None: any mix of ranks works."""
        del tier_ranks
        return None

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return no change yet: U and S zero, Vh the seeded A, of which all ranks get prefixes."""
        a_RI = initial_a(seed=self.seed, module=module, rank=rank, shape=shape)
        return {"U": torch.zeros(shape.out, rank), "S": torch.zeros(rank), "Vh": a_RI}

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the best approximation of the state at `rank`, all of S in B."""
        spectral = _spectral(state)
        if rank > spectral.rank:
            raise AdapterError(
                f"{module}: rank {rank} asked of a state of rank {spectral.rank}: ask for less"
            )
        scale = scale_of(alpha=self.alpha, scaling=self.scaling, rank=rank)
        return to_factors(spectral, rank=rank, scale=scale)

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return n_i."""
        return amounts(rows)

    def fold(self, block: FactorBlock, problem: Problem) -> Partial:
        """Return the block's weighted sum of products, as the problem's route holds it."""
        return routes.fold(block, self._with_room(problem))

    def finish(
        self,
        modules: Sequence[str],
        *,
        problem: Problem,
        partials: Iterable[Partial],
        total: float,
        before: Sequence[ModuleState],
        ranks: Sequence[int],
    ) -> list[ModuleAggregate]:
        """Return the leading triplets of the weighted sums of products, all able to train."""
        # an update is the client's whole adapter: the state it began from is within
        start = Start(seed=seed_of(self.seed, "aggregation", modules[0]), near_GKI=_near(before))
        problem = self._with_room(problem)
        blocks = chain(partials, self._kept(before, problem, total))
        found = routes.decompose(blocks, problem, total=total, start=start)
        return [
            self._aggregate(module, each, problem=problem, total=total, ranks=ranks, before=state)
            for module, each, state in zip(modules, found, before, strict=True)
        ]

    def _keeps(self, problem: Problem) -> bool:
        # at one rank everybody receives everything
        return self.options.truncated == "keep" and len(problem.partitions) > 1

    def _with_room(self, problem: Problem) -> Problem:
        """Return the problem with the rank of the block of kept directions.

        It follows from the configured ranks, whoever is left out: so does the route.
        """
        if not self._keeps(problem):
            return problem
        return replace(problem, stacked_rank=problem.stacked_rank + problem.rank)

    def _kept(
        self, before: Sequence[ModuleState], problem: Problem, total: float
    ) -> Iterator[Partial]:
        """Yield the block of what clients did not receive, unless they received all there is.

        It is sum_i n_i (W - W_{r_i}) = U diag(S_j (n - N_j)) V^T.
        """
        if not self._keeps(problem):
            return
        missed_R = total - direction_weights(problem)
        amounts_GR = torch.stack([state["S"].double().cpu() for state in before]) * missed_R
        if bool(amounts_GR.any()):
            u_GOR = torch.stack([state["U"] for state in before])
            vh_GRI = torch.stack([state["Vh"] for state in before])
            yield routes.fold_columns(u_GOR, vh_GRI, amounts_GR, problem)

    def _aggregate(
        self,
        module: str,
        found: Decomposition,
        *,
        problem: Problem,
        total: float,
        ranks: Sequence[int],
        before: ModuleState,
    ) -> ModuleAggregate:
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        live = with_live_directions(
            found.spectral,
            rank=problem.rank,
            seeded_a=lambda rank: initial_a(seed=self.seed, module=module, rank=rank, shape=shape),
        )
        return ModuleAggregate(
            state=carried(module, {"U": live.u_OR, "S": live.s_R, "Vh": live.vh_RI}),
            diagnostics=diagnose(
                replace(found, spectral=live),
                ranks=ranks,
                stacked_rank=problem.stacked_rank,
                before=alive_directions(_spectral(before)),
                partitions=partition_qualities(
                    problem,
                    total=total,
                    energies_before_R=before["S"].double().square(),
                    energies_R=live.s_R.double().square(),
                    untrained=self._untrained,
                ),
            ),
        )

    def _untrained(self, reach: float) -> float:
        return 1.0 if self.options.truncated == "keep" else reach

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return None: the base stays as it is."""
        del state
        return None


def _spectral(state: ModuleState) -> Spectral:
    return Spectral(u_OR=state["U"], s_R=state["S"], vh_RI=state["Vh"])


def _near(before: Sequence[ModuleState]) -> Tensor | None:
    """Return the modules' right singular vectors, unless one has none yet."""
    if not all(bool(state["S"].any()) for state in before):
        return None
    return torch.stack([state["Vh"] for state in before])
