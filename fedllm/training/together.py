"""The trainer of several clients at once: they share passes over the base, nothing else.

Every member has its own parameters, optimizer, clipping, rate and steps, and the seeds that it
would have alone. In exact arithmetic each trains as by itself; its rounding depends on who else is
in the group, and on nothing else.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedllm.packing.micro_batches import PackedPass, Pass
from fedllm.packing.precision import precision
from fedllm.packing.sequences import Packed
from fedllm.packing.slots import AdapterSlots
from fedllm.packing.stacked_adapters import StackedPass
from fedllm.planning.engines import GROUP_LAYOUT
from fedllm.training.energy import joules_of
from fedllm.training.loop import LocalSettings, Loop, TrainResult, reseed
from fedllm.training.plain import Plain, with_micro_batches
from fedllm.training.progress import Progress
from fedllm.training.trainer_protocol import Member, StepHook, no_hook

_Told = TypeVar("_Told", Progress, TrainResult)


@dataclass(frozen=True, kw_only=True)
class Together(Plain):
    """Trains several clients in one pass over the base, and one by itself as `Plain` does."""

    def train(
        self,
        members: Sequence[Member],
        *,
        micro_batch_size: int | None = None,
        before_step: StepHook = no_hook,
    ) -> list[TrainResult]:
        """Train the members, each on its own rows; see `Trainer`.

        A step is one of each member that has some left. Seconds are those of the group, shared out
        by the tokens that were computed for each; the peak of memory is the group's.
        """
        if len(members) == 1:
            return super().train(
                members, micro_batch_size=micro_batch_size, before_step=before_step
            )
        settings = with_micro_batches(self.settings, micro_batch_size)
        group = _Group(self.slots, members, settings)
        for number in range(group.num_done, group.num_steps):
            before_step(number, group.progress)
            group.step(number)
        return group.results()

    def remedies(self, num_clients: int, micro_batch_size: int) -> Sequence[str]:
        """Name the key that makes a group smaller, then those that make a step smaller."""
        fewer = ["a smaller training.clients_per_batch"] if num_clients > 1 else []
        return [*fewer, *super().remedies(num_clients, micro_batch_size)]


class _Group:
    """The moving parts of a group's training."""

    def __init__(
        self, slots: AdapterSlots, members: Sequence[Member], settings: LocalSettings
    ) -> None:
        self._begun = time.perf_counter()
        self._slots, self._settings = slots, settings
        assert slots.layout == GROUP_LAYOUT, (
            f"rows are {slots.layout}: clients cannot train together"
        )
        installed = slots.install_group([member.received() for member in members], settings.task)
        self._loops = [
            Loop(slots, own, member.rows, settings, member.draws)
            for own, member in zip(installed, members, strict=True)
        ]
        for loop, member in zip(self._loops, members, strict=True):
            if member.progress is not None:
                loop.resume(member.progress)
        done = [min(self.num_done, loop.num_steps) for loop in self._loops]
        assert done == [loop.num_done for loop in self._loops], "members at different steps"
        self._earlier: list[tuple[float, float, float | None]] = [
            (found.stats.seconds, found.stats.step_seconds, found.stats.energy_joules)
            if (found := member.progress)
            else (0.0, 0.0, 0.0)
            for member in members
        ]
        self._computed = [0] * len(members)  # tokens
        self._step_seconds = 0.0

    @property
    def num_done(self) -> int:
        """How many steps the group has taken."""
        return max(loop.num_done for loop in self._loops)

    @property
    def num_steps(self) -> int:
        """How many steps the member with most of them has."""
        return max(loop.num_steps for loop in self._loops)

    def progress(self) -> list[Progress]:
        """Return all that the rest depends on, of every member; waits for the device."""
        return self._shared([loop.progress for loop in self._loops])

    def results(self) -> list[TrainResult]:
        """Return what the training gave each member; waits for the device."""
        return self._shared([loop.result for loop in self._loops])

    def step(self, number: int) -> None:
        """Take a step of every member that has one."""
        active = [n for n, loop in enumerate(self._loops) if number < loop.num_steps]
        passes = {n: self._loops[n].passes(number, GROUP_LAYOUT) for n in active}
        # of the base's own dropouts, where it has any
        reseed(self._loops[active[0]].draws.step(number), self._slots.device)
        begun = time.perf_counter()
        losses = {n: torch.zeros((), device=self._slots.device) for n in active}
        for turn in range(max(map(len, passes.values()))):
            present = {n: passes[n][turn] for n in active if turn < len(passes[n])}
            targets = {n: max(1, sum(each.num_targets for each in passes[n])) for n in present}
            sums = self._losses(number, present)
            own = {n: loss / targets[n] for n, loss in zip(present, sums, strict=True)}
            torch.stack(list(own.values())).sum().backward()  # type: ignore[no-untyped-call]
            for n, loss in own.items():
                losses[n] += loss.detach()
                self._computed[n] += present[n].computed_tokens
        for n in active:
            self._loops[n].end_step(number, passes[n], losses[n])
        self._step_seconds += time.perf_counter() - begun

    def _losses(self, number: int, present: Mapping[int, Pass]) -> list[Tensor]:
        """Return the sums of the losses of one pass of some members' steps."""
        packs = [self._packed(each) for each in present.values()]
        stacked = StackedPass.of(packs)
        self._slots.use_members([self._loops[n].installed for n in present], stacked.lengths)
        pieces = [self._loops[n].pieces(number, each) for n, each in present.items()]
        self._slots.rows.enter(stacked.pieces(pieces))
        with precision(self._settings.training.precision, self._slots.device):
            return stacked.loss_sums(self._slots.model, GROUP_LAYOUT)

    @staticmethod
    def _packed(one: Pass) -> Packed:
        assert isinstance(one, PackedPass)
        return one.packed

    def _shared(self, calls: Sequence[Callable[[], _Told]]) -> list[_Told]:
        """Return what the members tell, with their shares of the group's seconds and energy."""
        begun = time.perf_counter()
        for loop in self._loops:
            loop.losses()  # waits for the device
        self._step_seconds += time.perf_counter() - begun
        told = [call() for call in calls]
        total = sum(self._computed) or 1
        passed = time.perf_counter() - self._begun
        used = self._loops[0].joules
        return [
            replace(
                each,
                stats=each.stats.model_copy(
                    update={
                        "seconds": seconds + passed * computed / total,
                        "step_seconds": step_seconds + self._step_seconds * computed / total,
                        "energy_joules": joules_of(
                            joules, None if used is None else used * computed / total
                        ),
                    }
                ),
            )
            for each, (seconds, step_seconds, joules), computed in zip(
                told, self._earlier, self._computed, strict=True
            )
        ]
