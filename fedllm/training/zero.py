"""The trainer of one client in several processes, with DeepSpeed ZeRO.

The rows of an optimizer step are divided by tokens. Every process packs and computes its own; the
gradients are summed, and the step's loss is the mean over the targets of all. Dropout masks follow
from a row's place in the step, so that they are those of a single process.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from fedllm.model.device import resolve_device
from fedllm.packing.micro_batches import Pass
from fedllm.packing.precision import precision
from fedllm.packing.sequences import length_of
from fedllm.planning.engines import engine_of
from fedllm.training.loop import LocalSettings, Loop, TrainResult, reseed
from fedllm.training.loop import StepHook as LoopHook
from fedllm.training.out_of_memory import ran_out
from fedllm.training.partitioned import PartitionedTraining, divide_base, process_group
from fedllm.training.plain import Plain, with_micro_batches
from fedllm.training.progress import Progress, named_tensors
from fedllm.training.shares import divide_rows
from fedllm.training.step_plan import rate_factor
from fedllm.training.trainer_protocol import Member, StepHook, no_hook


@dataclass(frozen=True, kw_only=True)
class Zero(Plain):
    """Trains one client at a time in the processes of a task; a single one takes part alone."""

    @property
    def num_processes(self) -> int:
        """What `training.processes` asks for."""
        return self.settings.training.processes

    @property
    def environment(self) -> Mapping[str, str]:
        """That of `Plain`, the version of DeepSpeed and the number of processes."""
        return {
            **super().environment,
            "deepspeed": version("deepspeed"),
            "processes": str(self.num_processes),
        }

    def train(
        self,
        members: Sequence[Member],
        *,
        micro_batch_size: int | None = None,
        before_step: StepHook = no_hook,
    ) -> list[TrainResult]:
        """Train the only member in all processes; see `Trainer`."""
        (member,) = members
        settings = with_micro_batches(self.settings, micro_batch_size)
        with process_group():
            assert dist.get_world_size() == self.num_processes, "another number of processes"
            if engine_of(settings.training).divides_base:
                settings = self._divided(settings)
            installed = self.slots.install(member.received(), settings.task)
            loop = ZeroLoop(self.slots, installed, member.rows, settings, member.draws)
            result = loop.run(
                member.progress, lambda step, snapshot: before_step(step, lambda: [snapshot()])
            )
        return [result]

    def remedies(self, num_clients: int, micro_batch_size: int) -> Sequence[str]:
        """Name the keys that make a step smaller; see `Trainer`."""
        if engine_of(self.settings.training).divides_base and micro_batch_size > 1:
            return ["a smaller training.micro_batch_size"]
        return super().remedies(num_clients, micro_batch_size)

    def _divided(self, settings: LocalSettings) -> LocalSettings:
        """Divide the base, unless it is; return the settings that train on it."""
        training = settings.training
        divide_base(self.slots, resolve_device(training.device), training.deepspeed)
        if settings.training.gradient_checkpointing != "auto":
            return settings
        # what fits may differ from process to process, and all compute the same layers
        changes = {"gradient_checkpointing": True}
        return replace(settings, training=settings.training.model_copy(update=changes))


class ZeroLoop(Loop):
    """The steps of a client as one of several processes takes them."""

    def run(self, progress: Progress | None, before_step: LoopHook) -> TrainResult:
        """Take every step that is left after `progress`, with all processes."""
        if progress is not None:
            self.resume(progress)
        partitioned = PartitionedTraining(
            self._parameters, self._optimizer, self._settings.training, self.device
        )
        with closing(partitioned) as self._partitioned:
            return self.take_steps(before_step)

    @property
    def joules(self) -> float | None:
        """None: each process would know of its own device only."""
        return None

    def progress(self) -> Progress:
        """Return all that the rest depends on, as one process would; all call this together."""
        tensors = named_tensors(self.installed, self._partitioned.kept())
        return Progress(tensors=tensors, stats=self.stats())

    def result(self) -> TrainResult:
        """Return what the training gave; a step whose gradient is not finite makes it fail."""
        result = super().result()
        norms = result.stats.gradient_norms
        step = next((n for n, norm in enumerate(norms, 1) if not math.isfinite(norm)), None)
        if step is None or result.reason:
            return result
        return replace(result, adapter={}, reason=f"the gradient of step {step} is not finite")

    def step(self, number: int) -> None:
        """Take one optimizer step; this process computes its share of the rows."""
        passes = self._own_passes(number)
        counts = self._counts(passes)
        targets = counts.targets
        reseed(self.draws.step(number), self.device)
        begun = perf_counter()
        try:
            part, gradients = self._own_part(number, passes, targets)
            if self._slots.is_divided:
                self._keep_up(number, counts.most_passes - len(passes))
        except (RuntimeError, MemoryError) as error:
            # with a divided base the others wait for this process's part of the weights
            if self._slots.is_divided or not ran_out(error):
                raise
            part, gradients = torch.zeros((), device=self.device), []
        total = self._summed(part, ran_out=not gradients)
        self.tokens += counts.tokens
        self.computed_tokens += counts.computed_tokens
        self.padded_tokens += self.padded_tokens_of(number)
        self.loss_tokens += targets
        self._losses.append(total)
        training = self._settings.training
        rate = training.learning_rate * rate_factor(number, self.num_steps, training)
        self._gradient_norms.append(torch.tensor(self._partitioned.step(gradients, rate)))
        self.step_seconds += perf_counter() - begun

    def _own_part(
        self, number: int, passes: Sequence[Pass], targets: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Return this process's part of a step's loss and gradient."""
        part = torch.zeros((), device=self.device)
        gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        for each in passes:
            loss = self._loss(number, each) / max(1, targets)
            torch._foreach_add_(gradients, torch.autograd.grad(loss, self._parameters))
            part += loss.detach()
        if dist.get_rank() == 0:  # gradients are summed over the processes
            self.add_terms(gradients)
        return part, gradients

    @staticmethod
    def _summed(part: Tensor, *, ran_out: bool) -> Tensor:
        """Return the sum of all processes' parts of a step's loss.

        Raises:
            MemoryError: one of them ran out of memory; all raise it together.
        """
        sums = torch.stack([part, part.new_tensor(float(ran_out))])
        dist.all_reduce(sums)
        if sums[1]:
            raise MemoryError("memory ran out in a process of this task")
        return sums[0]

    def _loss(self, number: int, one: Pass) -> Tensor:
        """Return the sum of the losses of a pass."""
        self._slots.rows.enter(self.pieces(number, one))
        with precision(self._settings.training.precision, self.device):
            return one.loss_sum(self._slots.model)

    def _keep_up(self, number: int, num_passes: int) -> None:
        """Compute with the others, who need this process's part of the weights; keep nothing."""
        shortest = min(self._steps[number], key=lambda place: length_of(self._rows[place]))
        place = self._steps[number].index(shortest)
        for _ in range(num_passes):
            (one,) = self.passes(number, self._slots.layout, [place])
            torch.autograd.grad(self._loss(number, one), self._parameters)

    def _own_passes(self, number: int) -> Sequence[Pass]:
        lengths = [length_of(self._rows[place]) for place in self._steps[number]]
        own = divide_rows(lengths, dist.get_world_size())[dist.get_rank()]
        return self.passes(number, self._slots.layout, own) if own else []

    @staticmethod
    def _counts(passes: Sequence[Pass]) -> "_StepCounts":
        counts = torch.zeros(3 + dist.get_world_size(), dtype=torch.int64)
        counts[0] = sum(each.num_tokens for each in passes)
        counts[1] = sum(each.num_targets for each in passes)
        counts[2] = sum(each.computed_tokens for each in passes)
        counts[3 + dist.get_rank()] = len(passes)
        dist.all_reduce(counts)
        tokens, targets, computed_tokens, *num_passes = counts.tolist()
        return _StepCounts(
            tokens=tokens,
            targets=targets,
            computed_tokens=computed_tokens,
            most_passes=max(num_passes),
        )


@dataclass(frozen=True, kw_only=True)
class _StepCounts:
    """Counts of a step over all processes, and the passes of the process with most of them."""

    tokens: int
    targets: int
    computed_tokens: int
    most_passes: int
