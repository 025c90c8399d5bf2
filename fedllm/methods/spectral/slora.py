"""SLoRA: first some entries of the weights train, and the SVD of their change starts FlexLoRA.

Babakniya et al., https://arxiv.org/abs/2308.06522: in the first `sparse_rounds` rounds clients
train a random mask of the weights instead of adapters. Then the base returns to what it was, and
the SVD of the accumulated change is the adapter with which the rounds of LoRA begin. They are
FlexLoRA's here, as Bai et al. (https://arxiv.org/abs/2402.11505) combine the two.

A client of rank r trains r (O + I) entries of a module, as many as its adapter has values. The
masks of smaller ranks are within those of larger ones. Every entry moves by the mean over the
clients whose mask holds it: with e_j the entries in the places of direction j of an adapter,
e_j <- e_j + sum_{i: r_i >= j} (n_i / N_j) e_ij. Everybody begins the next round with the change in
the base, and with zeros.

Entries train in float32, without scale and dropout. A learning rate moves them less than factors:
their gradient has no s^2. The records of these rounds have the energy of the change, but no
spectrum: only the last one needs an SVD of it.

Legend: G modules, O out, I in, R rank of the state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Certificate, Decomposition, Partial
from fedllm.config.scales import scale_of
from fedllm.lora.entries import entry_places, with_entries
from fedllm.lora.factors import FactorBlock, Factors, ModuleShape
from fedllm.lora.spectral import Spectral
from fedllm.methods.diagnostics import diagnose, partition_qualities, spectral_energies
from fedllm.methods.local_task import LocalTask, Recipient
from fedllm.methods.options import SLoraOptions
from fedllm.methods.pairs.pair_state import padded_sums, summed
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep, StatePart
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.methods.state import carried
from fedllm.methods.weights import direction_weights

_ENTRIES = ("entries_A", "entries_B")  # the values of the entries, in the shapes of A and B


@dataclass(frozen=True, kw_only=True)
class SLora(FlexLora):
    """FlexLoRA that begins with the change that some entries of the weights make."""

    name: ClassVar[str] = "slora"
    changes_base: ClassVar[bool] = True
    options_class: ClassVar[type[SLoraOptions]] = SLoraOptions

    options: SLoraOptions = field(default_factory=SLoraOptions)

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, StatePart]:
        """Return those of FlexLoRA, and the values of the entries."""
        values = _nothing(shape, rank)
        mine = {name: StatePart(shape=tuple(part.shape)) for name, part in values.items()}
        return {**super().parts(shape, rank), **mine}

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return no change yet."""
        start = super().start_module(module=module, shape=shape, rank=rank)
        return {**start, **_nothing(shape, rank)}

    def local_task(self, round_number: int) -> LocalTask:
        """Return that entries of the weights train, in the first rounds."""
        return LocalTask(entries_seed=self.seed if self._is_sparse(round_number) else None)

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return entries that are zero, at first, beside the adapter that the run began with."""
        if not self._is_sparse(to.round):
            return super().hand_out(module=module, state=state, rank=rank, to=to)
        u_OR, vh_RI = state["U"], state["Vh"]
        begun = Factors(a_RI=vh_RI, b_OR=u_OR * state["S"], scale=1.0)
        return Factors(
            a_RI=torch.zeros(rank, vh_RI.shape[1]),
            b_OR=torch.zeros(u_OR.shape[0], rank),
            scale=self._scale(rank),
            frozen=begun if bool(state["S"].any()) else None,
        )

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return sum_i n_i e_i of the block's entries; after the first rounds as FlexLoRA."""
        if not self._is_sparse(step.round):
            return super().fold(block, step)
        # a client's scale has only what its change was clipped by
        own = [self._scale(rank) if rank else 1.0 for rank in block.ranks]
        amounts_GC = block.weights_GC * block.scales_GC / torch.tensor(own, dtype=torch.float64)
        return padded_sums(block, step.problem.rank, of_a_GC=amounts_GC, of_b_GC=amounts_GC)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the base with the entries' means in it; in the last of these rounds their SVD."""
        problem = step.problem
        shape = ModuleShape(out=problem.out, in_=problem.in_)
        if not self._is_sparse(step.round):
            return [_without_entries(each, shape) for each in super().finish(partials, step)]
        moved = _moved(summed(partials), step)
        if step.round < self.options.sparse_rounds:
            return [self._in_base(place, each, step) for place, each in enumerate(moved)]
        changes = zip(moved, step.before, strict=True)
        whole_GOI = torch.stack([self._whole(entries, state) for entries, state in changes])
        formed = routes.formed(problem)
        folded = routes.fold_formed(whole_GOI, formed)
        found = routes.decompose([folded], formed, total=1.0, start=self.start_of(step))
        results = self.aggregates(found, step, untrained=lambda _part: 1.0)
        return [_without_entries(each, shape) for each in results]

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return the change that the entries make; None before and after it is in the base."""
        values = {name: state[name] for name in _ENTRIES}
        return self._change(values) if any(bool(v.any()) for v in values.values()) else None

    def _change(self, values: ModuleState) -> Tensor:
        a_RI, b_OR = (values[name] for name in _ENTRIES)
        shape = ModuleShape(out=b_OR.shape[0], in_=a_RI.shape[1])
        places = entry_places(seed=self.seed, shape=shape, rank=len(a_RI))
        return with_entries(a_RI, b_OR, places.to(a_RI.device))

    def _whole(self, entries: ModuleState, state: ModuleState) -> Tensor:
        """Return the change that the entries make, and the adapter that the run began with."""
        change = self._change(entries)
        if bool(state["S"].any()):
            change += (state["U"] * state["S"]) @ state["Vh"]
        return change

    def _in_base(self, place: int, entries: ModuleState, step: ServerStep) -> ModuleAggregate:
        """Return a state whose change stays in the base; diagnostics are of the whole change.

        Nobody needs its triplets, and a change of entries has no factors: an SVD of it would take
        many times as long as all else.
        """
        state = {**step.before[place], **entries}
        values = [self._whole(entries, state)] if bool(state["S"].any()) else entries.values()
        energy = sum(float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2 for v in values)
        none = Spectral(u_OR=state["U"][:, :0], s_R=state["S"][:0], vh_RI=state["Vh"][:0])
        found = Decomposition(
            spectral=none,
            total_energy=energy,
            route="entries",
            certificate=Certificate(residual_energy=energy, relative_excess=0.0),
        )
        energies = spectral_energies(step.problem, state["S"])
        diagnostics = diagnose(
            found,
            ranks=step.ranks,
            stacked_rank=step.problem.stacked_rank,
            partitions=partition_qualities(
                step.problem,
                total=step.total,
                before=energies,
                after=energies,
                untrained=lambda _part: 1.0,
            ),
            left=dict.fromkeys(step.ranks, 0.0),  # everybody has all of it
        )
        return ModuleAggregate(state=carried(step.modules[place], state), diagnostics=diagnostics)

    def _is_sparse(self, round_number: int) -> bool:
        return 1 <= round_number <= self.options.sparse_rounds

    def _scale(self, rank: int) -> float:
        return scale_of(alpha=self.alpha, scaling=self.scaling, rank=rank)


def _moved(sums: Mapping[str, Tensor], step: ServerStep) -> Sequence[ModuleState]:
    """Return the values of the entries after the round, by the module."""
    reach_R = direction_weights(step.problem)[: step.problem.rank].to(sums["A"].device)
    divisor_R = torch.where(reach_R > 0, reach_R, 1.0)
    a_GRI, b_GOR = sums["A"] / divisor_R[:, None], sums["B"] / divisor_R
    return [
        {
            name: (state[name].double() + added).float()
            for name, added in zip(_ENTRIES, pair, strict=True)
        }
        for state, *pair in zip(step.before, a_GRI, b_GOR, strict=True)
    ]


def _nothing(shape: ModuleShape, rank: int) -> dict[str, Tensor]:
    return {
        "entries_A": torch.zeros(rank, shape.in_),
        "entries_B": torch.zeros(shape.out, rank),
    }


def _without_entries(found: ModuleAggregate, shape: ModuleShape) -> ModuleAggregate:
    rank = len(found.state["S"])
    return replace(found, state={**found.state, **_nothing(shape, rank)})
