"""What a federated method is: the seam between the maths and everything that carries it.

A method is made with keyword settings only (`seed`, `alpha`, `scaling`) and holds no state: state
in, state out. A method with options of its own has a class attribute `options_class`, a
`fedllm.config.models.Section`; where `method.options` gives any, the method is made with `options`
too, an instance of that class. Clients' updates come in blocks, for some modules of one shape at
once: `fold` says what one block comes to, `finish` makes the new states of all blocks together.
Legend: G modules, C clients, O out, I in, R rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from torch import Tensor

from fedllm.aggregation.route_types import Partial, Problem
from fedllm.lora.factors import FactorBlock, Factors, ModuleShape
from fedllm.storage.records import ModuleDiagnostics

ModuleState: TypeAlias = Mapping[str, Tensor]  # part -> tensor: one module of the server's state


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
        """Return the clients' weights from the training rows that each one used.

        They need not sum to 1, and each follows from its own client alone: a client that is left
        out changes no other's weight.

        Raises:
            DataError: rows that no weight follows from.
        """

    def fold(self, block: FactorBlock, problem: Problem) -> Partial:
        """Return what a block of clients comes to, for each of its G modules.

        A block is folded by itself. Its tensors lie in buffers that the next block fills: the
        result holds nothing of them.

        Args:
            block: rank 0 is a client without these modules: it counts as zero.
            problem: the shape, the largest rank that anyone receives, and the weight of the
                clients that train each range of directions.

        Raises:
            AdapterError: updates that cannot be combined.
        """

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
        """Return the states after the round, one per module.

        Args:
            modules: the names of the G modules.
            problem: the same as `fold` was given.
            partials: of the blocks, in the clients' order; may be read lazily, and once.
            total: what the weights of all clients sum to.
            before: the modules' states before the round.
            ranks: all that anyone receives of these modules: the new states have room for the
                largest.

        Raises:
            AdapterError: a state that cannot be carried.
        """

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return the change of the base weight (O, I) that goes with the state, or None."""
