"""The spectral state that FlexLoRA and its kin carry, and its last step: an SVD of a sum.

Legend: G modules, O out, I in, R rank of the state (the largest that anyone needs).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import (
    Decomposition,
    Partial,
    Problem,
    RankPartition,
    Start,
)
from fedllm.config.scales import scale_of
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape, initial_a
from fedllm.lora.spectral import Spectral, alive_directions, to_factors, with_live_directions
from fedllm.methods.diagnostics import diagnose, partition_qualities, spectral_energies
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState, ServerStep, StatePart
from fedllm.methods.state import carried
from fedllm.methods.weights import amounts
from fedllm.planning.seeding import seed_of


@dataclass(frozen=True, kw_only=True)
class SpectralMethod(Method):
    """A method whose state is `U` (O, R), `S` (R,) and `Vh` (R, I): any rank is a slice of it."""

    kind: ClassVar[str] = "lora"

    seed: int
    alpha: float
    scaling: str = "fixed"

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, StatePart]:
        """Return the shapes of U, S and Vh."""
        return {
            "U": StatePart(shape=(shape.out, rank)),
            "S": StatePart(shape=(rank,)),
            "Vh": StatePart(shape=(rank, shape.in_)),
        }

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

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return None: the base stays as it is."""
        del state
        return None

    def decomposed(
        self,
        partials: Iterable[Partial],
        step: ServerStep,
        *,
        divisor: float,
        untrained: Callable[[RankPartition], float],
    ) -> list[ModuleAggregate]:
        """Return the leading triplets of the sum of `partials` over `divisor`, all able to train.

        Args:
            partials: what the blocks come to; read once.
            step: its problem is the one that the partial results were folded with.
            divisor: of the sum.
            untrained: what the method multiplies a range of directions by, had nobody trained.
        """
        start = self.start_of(step)
        found = routes.decompose(partials, step.problem, total=divisor, start=start)
        return self.aggregates(found, step, untrained=untrained)

    def start_of(self, step: ServerStep) -> Start:
        """Return the start of an iterative route: the state before the round is near."""
        seed = seed_of(self.seed, "aggregation", step.modules[0])
        return Start(seed=seed, near_GKI=_near(step.before))

    def aggregates(
        self,
        found: Sequence[Decomposition],
        step: ServerStep,
        *,
        untrained: Callable[[RankPartition], float],
    ) -> list[ModuleAggregate]:
        """Return the states of triplets, all able to train; arguments as of `decomposed`."""
        problem = step.problem
        results = []
        for module, each, state in zip(step.modules, found, step.before, strict=True):
            live = self._live(module, each, problem)
            diagnostics = diagnose(
                live,
                ranks=step.ranks,
                stacked_rank=problem.stacked_rank,
                before=alive_directions(_spectral(state)),
                partitions=partition_qualities(
                    problem,
                    total=step.total,
                    before=spectral_energies(problem, state["S"]),
                    after=spectral_energies(problem, live.spectral.s_R),
                    untrained=untrained,
                ),
            )
            triplets = live.spectral
            parts = {"U": triplets.u_OR, "S": triplets.s_R, "Vh": triplets.vh_RI}
            results.append(ModuleAggregate(state=carried(module, parts), diagnostics=diagnostics))
        return results

    def _live(self, module: str, found: Decomposition, problem: Problem) -> Decomposition:
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        live = with_live_directions(
            found.spectral,
            rank=problem.rank,
            seeded_a=lambda rank: initial_a(seed=self.seed, module=module, rank=rank, shape=shape),
        )
        return replace(found, spectral=live)


def with_room(step: ServerStep) -> ServerStep:
    """Return the step with the rank of one more block in its problem, that of the state before.

    It follows from the configured ranks, whoever is left out: so does the route. Where all ranks
    are equal everybody receives the whole state, and the problem stays.
    """
    problem = step.problem
    if len(problem.partitions) <= 1:
        return step
    roomy = replace(problem, stacked_rank=problem.stacked_rank + problem.rank)
    return replace(step, problem=roomy)


def with_state(
    partials: Iterable[Partial], step: ServerStep, amounts_R: Tensor
) -> Iterator[Partial]:
    """Return the blocks and, behind them, U diag(amounts_j S_j) V^T of the state before the round.

    The block is left out where it is zero.

    Args:
        partials: of the clients' blocks.
        step: as `with_room` returns it.
        amounts_R: float64, one for each direction of the state.
    """

    def block() -> Iterator[Partial]:
        if len(step.problem.partitions) <= 1:
            return
        s_GR = torch.stack([state["S"].double().cpu() for state in step.before]) * amounts_R
        if bool(s_GR.any()):
            u_GOR = torch.stack([state["U"] for state in step.before])
            vh_GRI = torch.stack([state["Vh"] for state in step.before])
            yield routes.fold_columns(u_GOR, vh_GRI, s_GR, step.problem)

    return chain(partials, block())


def _spectral(state: ModuleState) -> Spectral:
    return Spectral(u_OR=state["U"], s_R=state["S"], vh_RI=state["Vh"])


def _near(before: Sequence[ModuleState]) -> Tensor | None:
    """Return the modules' right singular vectors, unless one has none yet."""
    if not all(bool(state["S"].any()) for state in before):
        return None
    return torch.stack([state["Vh"] for state in before])
