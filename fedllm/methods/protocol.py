"""What a federated method is: the seam between the maths and everything that carries it.

A method is made with keyword settings only (`seed`, `alpha`, `scaling`) and holds no state: state
in, state out. A method with options of its own has a class attribute `options_class`, a
`fedllm.config.models.Section`; where `method.options` gives any, the method is made with `options`
too, an instance of that class. Clients' updates come in blocks, for some modules of one shape at
once: `fold` says what one block comes to, `finish` makes the new states of all blocks together.
The JSON part of the state has what is not of one module: `next_notes` makes it before any `fold`.

A complete method, short rather than fast: the mean of the clients' changes is its state.

>>> import torch
>>> from fedllm.aggregation.route_types import Certificate, Decomposition
>>> from fedllm.lora.factors import Factors
>>> from fedllm.lora.spectral import Spectral, to_factors
>>> from fedllm.methods.diagnostics import diagnose
>>> from fedllm.methods.protocol import Method, ModuleAggregate, StatePart
>>> class MeanOfChanges(Method):
...     kind, name = "lora", "mean_of_changes"
...
...     def __init__(self, *, seed, alpha, scaling="fixed"):
...         self.alpha = alpha  # the scale of an adapter of rank r is alpha / r
...
...     def parts(self, shape, rank):
...         return {"W": StatePart(shape=(shape.out, shape.in_))}
...
...     def refuse(self, tier_ranks):
...         return None  # ranks may differ
...
...     def start_module(self, *, module, shape, rank):
...         return {"W": torch.zeros(shape.out, shape.in_)}
...
...     def module_adapter(self, *, module, state, rank):
...         return to_factors(svd(state["W"]), rank=rank, scale=self.alpha / rank)
...
...     def weigh(self, rows):
...         return [float(n) for n in rows]
...
...     def fold(self, block, step):  # sum over the block: weight x scale x B A
...         amounts_GC = block.weights_GC * block.scales_GC
...         amounts_GR = amounts_GC.repeat_interleave(torch.tensor(block.ranks), dim=1)
...         return {"W": (block.b_GOR.double() * amounts_GR[:, None]) @ block.a_GRI.double()}
...
...     def finish(self, partials, step):
...         mean_GOI = sum(partial["W"] for partial in partials) / step.total
...         return [aggregate_of(w_OI, step) for w_OI in mean_GOI]
...
...     def base_delta(self, state):
...         return None  # the base stays as it is
>>> def svd(w_OI):
...     u_OR, s_R, vh_RI = torch.linalg.svd(w_OI, full_matrices=False)
...     return Spectral(u_OR=u_OR, s_R=s_R, vh_RI=vh_RI)
>>> def aggregate_of(w_OI, step):
...     whole = Decomposition(
...         spectral=svd(w_OI),
...         total_energy=float(w_OI.square().sum()),
...         route="dense",
...         certificate=Certificate(residual_energy=0.0, relative_excess=0.0),
...     )
...     told = diagnose(whole, ranks=step.ranks, stacked_rank=step.problem.stacked_rank)
...     return ModuleAggregate(state={"W": w_OI.float()}, diagnostics=told)

Legend: G modules, C clients, O out, I in, R rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Partial, Problem
from fedllm.lora.factors import Adapter, BaseDelta, FactorBlock, Factors, ModuleShape
from fedllm.methods.local_task import LocalTask, Recipient, TrainedFactors
from fedllm.storage.records import ModuleDiagnostics, SentFactors

ModuleState: TypeAlias = Mapping[str, Tensor]  # part -> tensor: one module of the server's state
StateNotes: TypeAlias = Mapping[str, Any]  # the JSON part of the server's state
# a trained core is in B
_SENT: Mapping[TrainedFactors, SentFactors] = {"AB": "AB", "A": "A", "B": "B", "C": "B"}


@dataclass(frozen=True, kw_only=True)
class StatePart:
    """Shape and number format of a tensor of a module's state."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class UsedClients:
    """The clients whose updates a round uses, in the order of the cohort.

    Of each: its id, its weight, the rank of every module, and what it told (`client_notes`).
    """

    round: int
    clients: Sequence[str]
    weights: Sequence[float]
    ranks: Sequence[Mapping[str, int]] = ()
    notes: Sequence[StateNotes] = ()


@dataclass(frozen=True, kw_only=True)
class ServerStep:
    """A round, for some modules of one shape that are aggregated side by side.

    Attributes:
        modules: the names of the G modules.
        problem: the shape, the largest rank that anyone receives, and the weight of the clients
            that train each range of directions.
        total: what the weights of all clients sum to.
        before: the modules' states before the round.
        ranks: all that anyone receives of these modules: the new states have room for the largest.
        round: its number, from 1; 0 where a starting adapter becomes the first state.
        notes: the JSON part of the state after the round, as `next_notes` made it.
        noise_std: the standard deviation of the noise on each entry of a sum, where clients are
            private: then weights are what their clipped changes count, and `total` is not their
            sum; 0: no noise.
        clients: the ids of the cohort's clients, by the places of `FactorBlock.clients`; empty
            where adapters are combined that no client of a round has sent.
    """

    modules: Sequence[str]
    problem: Problem
    total: float
    before: Sequence[ModuleState]
    ranks: Sequence[int]
    round: int
    notes: StateNotes = field(default_factory=dict)
    noise_std: float = 0.0
    clients: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ModuleAggregate:
    """One module's new state and how it came about."""

    state: ModuleState
    diagnostics: ModuleDiagnostics


class Method(Protocol):
    """One federated method: one file, one paper.

    `name` is what `method.name` says, `kind` the kind of update its clients send. `per_client` says
    whether clients of equal ranks receive different adapters, `changes_base` whether its states
    hold a change of the base, `keeps_at_clients` whether clients keep something between their
    rounds, `server_sides` which optimizers of the server (`method.server`) can
    move its state: they are passed as `server`.
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    per_client: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    keeps_at_clients: ClassVar[bool] = False
    server_sides: ClassVar[tuple[str, ...]] = ()

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, StatePart]:
        """Return the shapes and number formats of a module's state tensors at the state's rank."""

    def next_parts(
        self,
        shape: ModuleShape,
        rank: int,
        *,
        before: Mapping[str, tuple[int, ...]],
        stacked_rank: int,
    ) -> Mapping[str, StatePart]:
        """Return the same of the state after a round, where states grow.

        Args:
            shape: of the weight.
            rank: of the state.
            before: the shapes of the module's state before the round.
            stacked_rank: the sum of the ranks of the whole cohort.
        """
        del before, stacked_rank
        return self.parts(shape, rank)

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return why these tiers' ranks (one mapping per tier) cannot work, or None.

        The reason is one line that names the key and the remedy.
        """

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return the state of round 0 at the largest rank anyone needs."""

    def start_notes(self) -> StateNotes:
        """Return the JSON part of the state of round 0."""
        return {}

    def next_notes(self, before: StateNotes, used: UsedClients) -> StateNotes:
        """Return the JSON part of the state after a round: what JSON holds, and no more."""
        del used
        return before

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the adapter of `rank`, as it is evaluated and exported.

        Raises:
            AdapterError: the state cannot give that rank.
        """

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return what a client of `rank` receives: the factors that it trains, frozen ones beside.

        `to` counts only where `per_client` is set: what clients of a tier receive is kept.

        Raises:
            AdapterError: the state cannot give that rank.
        """
        del to
        return self.module_adapter(module=module, state=state, rank=rank)

    def kept(self, *, module: str, trained: Factors) -> ModuleState:
        """Return what a client keeps of a module after its training, where `keeps_at_clients`.

        It is `to.kept` of the client's next `hand_out`, in whatever round that is.
        """
        del module, trained
        return {}

    def kept_notes(self, *, before: StateNotes, trained: Adapter) -> StateNotes:
        """Return what a client keeps beside the tensors, as JSON holds it: counters, for example.

        It is `to.notes` of the client's next `hand_out`, where `keeps_at_clients`.

        Args:
            before: what it kept from its last round; empty at first.
            trained: its factors after training.
        """
        del before, trained
        return {}

    def client_notes(self, *, trained: Adapter, received: Callable[[], Adapter]) -> StateNotes:
        """Return what a client tells beside its factors, as JSON holds it.

        Args:
            trained: its factors after training.
            received: returns those that it began with.
        """
        del trained, received
        return {}

    def sent_factors(self, round_number: int) -> SentFactors:
        """Return which factors the clients of a round send.

        The others count as those of `module_adapter`, of the state before the round.
        """
        return _SENT[self.local_task(round_number).trained]

    def sent(self, *, module: str, trained: Factors, notes: StateNotes) -> Factors:
        """Return what a client sends of the factors that it trained, in their shapes."""
        del module, notes
        return trained

    def assign(
        self, *, notes: StateNotes, client: str, ranks: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the rank of every module that a client trains from the next round on.

        Args:
            notes: the JSON part of the state after the round.
            client: its id.
            ranks: those of its tier; no rank may be higher.
        """
        del notes, client
        return ranks

    def local_task(self, round_number: int) -> LocalTask:
        """Return what the clients of a round train."""
        del round_number
        return LocalTask()

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return the clients' weights from the training rows that each one used.

        They need not sum to 1, and each follows from its own client alone: a client that is left
        out changes no other's weight.

        Raises:
            DataError: rows that no weight follows from.
        """

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return what a block of clients comes to, for each of its G modules.

        A block is folded by itself. Its tensors lie in buffers that the next block fills: the
        result holds nothing of them.

        Args:
            block: rank 0 is a client without these modules: it counts as zero.
            step: the modules and the round.

        Raises:
            AdapterError: updates that cannot be combined.
        """

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the states after the round, one per module.

        Args:
            partials: of the blocks, in the clients' order; may be read lazily, and once.
            step: the same as `fold` was given.

        Raises:
            AdapterError: a state that cannot be carried.
        """

    def base_delta(self, state: ModuleState) -> BaseDelta | None:
        """Return the change of the base weight (O, I) that goes with the state, or None.

        It is in the base of clients, evaluations and exported models. It may be given as factors,
        or as several terms. None unless `changes_base`.
        """
