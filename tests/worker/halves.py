"""A worker of two processes: its trainer computes half of the passes in each.

`halves.py ATTEMPT`, once for each process; the environment gives its rank.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fedllm.packing.slots import AdapterSlots
from fedllm.process.renewal import ANEW, begin_anew
from fedllm.process.session import Session
from fedllm.process.signals import StopSignals
from fedllm.programs.entry_points import run
from fedllm.training.loop import LocalSettings, Loop, TrainResult
from fedllm.training.plain import Plain, with_micro_batches
from fedllm.training.progress import Progress
from fedllm.training.provenance import environment
from fedllm.training.trainer_protocol import Member, StepHook, no_hook

PAUSE = "HALVES_PAUSE"  # seconds before a step


class Half(Loop):
    """The steps of a client, of which each process computes every other pass."""

    def step(self, number: int) -> None:
        """Take one optimizer step by the gradients of all processes."""
        time.sleep(float(os.environ.get(PAUSE, "0")))
        passes = self.passes(number, self._slots.layout)
        targets = sum(one_pass.num_targets for one_pass in passes)
        total = torch.zeros(())
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        for one_pass in passes[dist.get_rank() :: dist.get_world_size()]:
            self._slots.rows.enter(self.pieces(number, one_pass))
            loss = one_pass.loss_sum(self._slots.model) / max(1, targets)
            loss.backward()
            total += loss.detach()
        for tensor in (total, *(parameter.grad for parameter in self._parameters)):
            dist.all_reduce(tensor)
        self.end_step(number, passes, total)


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Trains one client at a time in two processes."""

    slots: AdapterSlots
    settings: LocalSettings

    @property
    def num_processes(self) -> int:
        """Two."""
        return 2

    @property
    def environment(self) -> Mapping[str, str]:
        """As of one process, and that there are two."""
        return {**environment(self.settings.training, "cpu"), "processes": "2"}

    def train(
        self,
        members: Sequence[Member],
        *,
        micro_batch_size: int | None = None,
        before_step: StepHook = no_hook,
    ) -> list[TrainResult]:
        """Train the only member."""
        (member,) = members
        settings = with_micro_batches(self.settings, micro_batch_size)
        loop = Half(
            self.slots,
            self.slots.install(member.received()),
            member.rows,
            settings,
            member.draws,
        )

        def snapshots() -> list[Progress]:
            # as of an engine that has a part of the factors in each process
            dist.all_reduce(torch.zeros(1))
            return [loop.progress()]

        return [loop.run(member.progress, lambda step, _own: before_step(step, snapshots))]

    def remedies(self, num_clients: int, micro_batch_size: int) -> Sequence[str]:
        """As of one process."""
        return Plain(slots=self.slots, settings=self.settings).remedies(
            num_clients, micro_batch_size
        )

    def let_go(self) -> None:
        """As of one process."""
        Plain(slots=self.slots, settings=self.settings).let_go()


if __name__ == "__main__":
    with StopSignals() as noted:
        session = Session(trainers={"plain": Halves})
        code = run("client", sys.argv[1:], session=session, signals=noted)
        sys.exit(code if code != ANEW else begin_anew(sys.orig_argv[1:], signals=noted))
