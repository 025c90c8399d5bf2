"""The spectral state that FlexLoRA and its kin carry, and its last step: an SVD of a sum.

Legend: G modules, O out, I in, R rank of the state (the largest that anyone needs).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, TypeVar

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
from fedllm.lora.factors import BaseDelta, Factors, ModuleShape, initial_a
from fedllm.lora.spectral import Spectral, alive_directions, to_factors, with_live_directions
from fedllm.methods.diagnostics import diagnose, partition_qualities, spectral_energies
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState, ServerStep, StatePart
from fedllm.methods.server_side import Momentum
from fedllm.methods.state import carried
from fedllm.methods.weights import amounts
from fedllm.planning.seeding import seed_of

T = TypeVar("T")
_TRIPLETS = ("U", "S", "Vh")


@dataclass(frozen=True, kw_only=True)
class SpectralMethod(Method):
    """A method whose state is `U` (O, R), `S` (R,) and `Vh` (R, I): any rank is a slice of it."""

    kind: ClassVar[str] = "lora"
    server_sides: ClassVar[tuple[str, ...]] = ("fedavgm",)

    seed: int
    alpha: float
    scaling: str = "fixed"
    server: Momentum | None = None

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, StatePart]:
        """Return the shapes of U, S and Vh; with momentum, also of the last ones."""
        triplets = {
            "U": StatePart(shape=(shape.out, rank)),
            "S": StatePart(shape=(rank,)),
            "Vh": StatePart(shape=(rank, shape.in_)),
        }
        return {**triplets, **self._last(triplets)}

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return None: any mix of ranks works."""
        del tier_ranks
        return None

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return no change yet: U and S zero, Vh the seeded A, of which all ranks get prefixes."""
        a_RI = initial_a(seed=self.seed, module=module, rank=rank, shape=shape)
        start = {"U": torch.zeros(shape.out, rank), "S": torch.zeros(rank), "Vh": a_RI}
        return {**start, **self._last(start)}

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the best approximation of the state at `rank`, all of S in B."""
        spectral = _spectral(state)
        if rank > spectral.rank:
            raise AdapterError(
                f"{module}: got rank {rank}, the state has {spectral.rank}: choose less"
            )
        scale = scale_of(alpha=self.alpha, scaling=self.scaling, rank=rank)
        return to_factors(spectral, rank=rank, scale=scale)

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return n_i."""
        return amounts(rows)

    def base_delta(self, state: ModuleState) -> BaseDelta | None:
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
        found = self._moved(found, step, start)
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
            parts |= self._last(state if step.round else parts)
            results.append(ModuleAggregate(state=carried(module, parts), diagnostics=diagnostics))
        return results

    def _last(self, parts: Mapping[str, T]) -> dict[str, T]:
        """Return what momentum keeps of a state: U, S and Vh under names of their own."""
        return {f"last_{name}": parts[name] for name in _TRIPLETS} if self.server else {}

    def _moved(
        self, found: list[Decomposition], step: ServerStep, start: Start
    ) -> list[Decomposition]:
        """Return the leading triplets of x + beta (x - x_last) + eta D, one stack of three."""
        if self.server is None or not step.round or self.server.is_still:
            return found
        new = [each.spectral for each in found]
        now = [_spectral(state) for state in step.before]
        last = [_spectral({n: s[f"last_{n}"] for n in _TRIPLETS}) for s in step.before]
        terms = list(zip(new, now, last, strict=True))
        coefficients = self.server.coefficients
        b_GOR = torch.stack([torch.cat([t.u_OR.double() for t in each], 1) for each in terms])
        a_GRI = torch.stack([torch.cat([t.vh_RI.double() for t in each]) for each in terms])
        s_GR = torch.stack(
            [
                torch.cat([c * t.s_R.double() for c, t in zip(coefficients, each, strict=True)])
                for each in terms
            ]
        )
        problem = replace(step.problem, stacked_rank=s_GR.shape[1])
        partial = routes.fold_columns(b_GOR, a_GRI, s_GR, problem)
        return routes.decompose([partial], problem, total=1.0, start=start)

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
    are equal everybody receives the whole state, and the problem stays, unless changes are clipped.
    """
    problem = step.problem
    if _is_whole(step):
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
        if _is_whole(step):
            return
        s_GR = torch.stack([state["S"].double().cpu() for state in step.before]) * amounts_R
        if bool(s_GR.any()):
            u_GOR = torch.stack([state["U"] for state in step.before])
            vh_GRI = torch.stack([state["Vh"] for state in step.before])
            yield routes.fold_columns(u_GOR, vh_GRI, s_GR, step.problem)

    return chain(partials, block())


def _is_whole(step: ServerStep) -> bool:
    """Whether all clients receive the whole state, and no change of theirs is clipped."""
    return len(step.problem.partitions) <= 1 and not step.noise_std


def _spectral(state: ModuleState) -> Spectral:
    return Spectral(u_OR=state["U"], s_R=state["S"], vh_RI=state["Vh"])


def _near(before: Sequence[ModuleState]) -> Tensor | None:
    """Return the modules' right singular vectors, unless one has none yet."""
    if not all(bool(state["S"].any()) for state in before):
        return None
    return torch.stack([state["Vh"] for state in before])
