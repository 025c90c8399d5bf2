"""What a federated method is: the seam between the maths and everything that carries it.

A method is made with keyword settings only (`seed`, `alpha`, `scaling` and its own options) and
holds no state: state in, state out, module by module. Legend: O out, I in, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from torch import Tensor

from fedllm.lora.factors import Factors, ModuleShape

ModuleState: TypeAlias = Mapping[str, Tensor]  # part -> tensor: one module of the server's state


class ModuleUpdates(Protocol):
    """The cohort's updates of one module, read when iterated, in canonical client order."""

    def __len__(self) -> int:
        """How many clients' updates there are."""

    def __iter__(self) -> Iterator[Factors]:
        """Yield each client's factors of this module."""


@dataclass(frozen=True, kw_only=True)
class RankDiagnostics:
    """What an adapter of `rank` keeps of the aggregated change of one module.

    `energy_kept` is a share of the squared Frobenius norm; `truncation_error` is the Frobenius
    norm of what is left out and `relative_error` the same over the norm of the change (0 where
    there is no change).
    """

    rank: int
    energy_kept: float
    truncation_error: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class ModuleDiagnostics:
    """How one module was aggregated: leading singular values, energy, errors per rank."""

    spectrum: tuple[float, ...]
    total_energy: float
    ranks: tuple[RankDiagnostics, ...]
    stacked_rank: int
    route: str


@dataclass(frozen=True, kw_only=True)
class ModuleAggregate:
    """One module's new state and how it came about."""

    state: ModuleState
    diagnostics: ModuleDiagnostics


class Method(Protocol):
    """One federated method: one file, one paper.

    `name` is what `method.name` says, `kind` the kind of update its clients send.
    """

    kind: ClassVar[str]
    name: ClassVar[str]

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, tuple[int, ...]]:
        """Return the names and shapes of a module's state tensors at the state's rank."""

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return why these tiers' ranks (one mapping per tier) cannot work, or None.

        The reason is one line that names the key and the remedy.
        """

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return the state of round 0, float32, at the largest rank anyone needs."""

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return what a client of `rank` receives.

        Raises:
            AdapterError: the state cannot give that rank.
        """

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return the clients' weights, which sum to 1, from the training rows each one used.

        Raises:
            DataError: nothing to weigh by.
        """

    def aggregate_module(
        self,
        *,
        module: str,
        state: ModuleState,
        updates: ModuleUpdates,
        weights: Sequence[float],
        ranks: Sequence[int],
    ) -> ModuleAggregate:
        """Return the state after the round, from the state before it and the clients' updates.

        `weights` are the updates' own, in their order; `ranks` are all that anyone receives of
        this module: the new state has room for the largest.

        Raises:
            AdapterError: updates that cannot be combined.
        """

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return the change of the base weight (O, I) that goes with the state, or None."""
