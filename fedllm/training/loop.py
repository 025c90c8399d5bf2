"""The local training of one client: a plain loop over a base that is already in memory."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedllm.config.models import TrainingSection
from fedllm.lora.factors import Adapter
from fedllm.methods.local_rules import LocalRule
from fedllm.methods.local_task import LocalTask
from fedllm.packing.batches import LossOn, TokenRow
from fedllm.packing.installed import Installed
from fedllm.packing.micro_batches import PACKERS, Cut, Pass
from fedllm.packing.precision import precision
from fedllm.packing.row_dropout import Piece
from fedllm.packing.sequences import length_of
from fedllm.packing.slots import AdapterSlots
from fedllm.storage.records import TrainingStats
from fedllm.training.energy import EnergyMeter, energy_counter, joules_of
from fedllm.training.optimizers import build_optimizer
from fedllm.training.progress import Progress, restore, tensors_of
from fedllm.training.step_plan import Draws, plan_steps, rate_factor

_SMALLEST = 1e-30
Snapshot = Callable[[], Progress]
StepHook = Callable[[int, Snapshot], None]


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How clients train; the same for all clients of a round.

    `rule` is the client side, `task` what the method asks of the round. `by_length`: padded rows of
    a step that is cut into micro-batches are grouped by length.
    """

    training: TrainingSection
    rule: LocalRule
    loss_on: LossOn = "answer"
    by_length: bool = True
    task: LocalTask = field(default_factory=LocalTask)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What one client's training gave.

    `adapter` holds the trained factors, empty where training failed; `reason` then says why.
    `norms` are the Frobenius norms of A and B per module.
    """

    adapter: Adapter
    reason: str
    stats: TrainingStats
    norms: dict[str, tuple[float, float]]
    scales: dict[str, float]


def train_client(
    slots: AdapterSlots,
    adapter: Adapter,
    rows: Sequence[TokenRow],
    *,
    settings: LocalSettings,
    draws: Draws,
    progress: Progress | None = None,
    before_step: StepHook = lambda _step, _snapshot: None,
) -> TrainResult:
    """Train a copy of `adapter` on a client's rows.

    The result is a function of the arguments, whatever was trained before it in this process, and
    the same from any progress of this training; only seconds and memory tell them apart.

    Args:
        slots: the base model, which stays as it is.
        adapter: what the client received.
        rows: the client's training rows, at least one.
        settings: how clients train.
        draws: the identity that all randomness follows from.
        progress: goes on from there, with the same arguments; None: from the start.
        before_step: called with the step's number, from 0, and a function that returns the
            progress as it is; what it raises ends the training.
    """
    installed = slots.install(adapter, settings.task)
    loop = Loop(slots, installed, rows, settings, draws)
    return loop.run(progress, before_step)


class Loop:
    """The moving parts of one client's training.

    Args:
        slots: the base model.
        installed: what the client trains there.
        rows: its training rows.
        settings: how clients train.
        draws: the identity that all randomness follows from.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        installed: Installed,
        rows: Sequence[TokenRow],
        settings: LocalSettings,
        draws: Draws,
    ) -> None:
        self._begun = time.perf_counter()
        self.draws = draws
        self.device = slots.device
        self.installed = installed
        self.tokens = self.loss_tokens = self.computed_tokens = self.padded_tokens = 0
        self.step_seconds = 0.0
        self._earlier_peak = 0
        self._energy = EnergyMeter(energy_counter(slots.device))
        self._earlier_joules: float | None = 0.0
        self._slots, self._rows, self._settings = slots, rows, settings
        self._steps = plan_steps(len(rows), settings.training, draws)
        self._earlier_losses: list[float] = []
        self._losses: list[Tensor] = []
        self._earlier_gradient_norms: list[float] = []
        self._gradient_norms: list[Tensor] = []
        self._parameters = installed.parameters
        # what the proximal term draws back to: a resumed training begins at what it received, too
        self._received = [p.detach().clone() for p in self._parameters] if settings.rule.mu else []
        self._optimizer: Optimizer = build_optimizer(
            self._parameters, settings.rule, settings.training
        )
        slots.train(recompute=settings.training.gradient_checkpointing)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def num_steps(self) -> int:
        """How many optimizer steps there are."""
        return len(self._steps)

    @property
    def num_done(self) -> int:
        """How many optimizer steps were taken."""
        return len(self._earlier_losses) + len(self._losses)

    @property
    def seconds(self) -> float:
        """How long the training has taken."""
        return time.perf_counter() - self._begun

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that was in use."""
        return max(self._earlier_peak, _peak_memory_bytes(self.device))

    @property
    def joules(self) -> float | None:
        """The energy of the device since the training was begun or resumed; None: not told."""
        return self._energy.joules()

    def run(self, progress: Progress | None, before_step: StepHook) -> TrainResult:
        """Take every step that is left after `progress`; arguments as of `train_client`."""
        if progress is not None:
            self.resume(progress)
        return self.take_steps(before_step)

    def take_steps(self, before_step: StepHook) -> TrainResult:
        """Take every step that is left."""
        for number in range(self.num_done, self.num_steps):
            before_step(number, self.progress)
            self.step(number)
        return self.result()

    def progress(self) -> Progress:
        """Return all that the rest depends on; waits for the device."""
        return Progress(tensors=tensors_of(self.installed, self._optimizer), stats=self.stats())

    def stats(self) -> TrainingStats:
        """Return the numbers of the steps that were taken; waits for the device."""
        losses = self.losses()
        norms: list[float] = torch.stack(self._gradient_norms).tolist() if self._losses else []
        return TrainingStats(
            rows=len({place for places in self._steps[: self.num_done] for place in places}),
            steps=self.num_done,
            tokens=self.tokens,
            loss_tokens=self.loss_tokens,
            losses=losses,
            gradient_norms=[*self._earlier_gradient_norms, *norms],
            seconds=self.seconds,
            step_seconds=self.step_seconds,
            peak_memory_bytes=self.peak_memory_bytes,
            computed_tokens=self.computed_tokens,
            padded_tokens=self.padded_tokens,
            energy_joules=joules_of(self._earlier_joules, self.joules),
        )

    def resume(self, progress: Progress) -> None:
        """Be where a training of the same client was."""
        restore(self.installed, self._optimizer, progress.tensors)
        stats = progress.stats
        self._earlier_losses = list(stats.losses)
        self._earlier_gradient_norms = list(stats.gradient_norms)
        self._earlier_peak = stats.peak_memory_bytes
        self._earlier_joules = stats.energy_joules
        self.tokens, self.loss_tokens = stats.tokens, stats.loss_tokens
        self.computed_tokens, self.padded_tokens = stats.computed_tokens, stats.padded_tokens
        self._begun -= stats.seconds
        self.step_seconds = stats.step_seconds
        assert self.num_done == progress.step, f"{self.num_done} losses at step {progress.step}"

    def result(self) -> TrainResult:
        """Return what the training gave; waits for the device."""
        stats = self.stats()
        norms = _norms(self.installed)
        reason = _emptied(self.installed) or _failure(stats.losses, norms)
        return TrainResult(
            adapter={} if reason else self.installed.factors(),
            reason=reason,
            stats=stats,
            norms=norms,
            scales=dict(self.installed.scales),
        )

    def passes(
        self, number: int, layout: str, places: Sequence[int] | None = None
    ) -> Sequence[Pass]:
        """Return the rows of an optimizer step as the forward passes that compute them.

        Args:
            number: the step, from 0.
            layout: how rows are computed together.
            places: which rows of the step; None: all.
        """
        training = self._settings.training
        cut = Cut(
            loss_on=self._settings.loss_on,
            pad_token=self._slots.pad_token,
            device=self.device,
            max_rows=training.micro_batch_size,
            max_tokens=training.micro_batch_tokens,
            by_length=self._settings.by_length,
            places=places,
        )
        return PACKERS[layout]([self._rows[place] for place in self._steps[number]], cut)

    def pieces(self, number: int, one: Pass) -> list[Piece]:
        """Return the pieces of a pass of an optimizer step, with their seeds."""
        return one.pieces(partial(self.draws.row, number), self.draws.prefix(number))

    def step(self, number: int) -> None:
        """Take one optimizer step; its loss is the mean over all its targets."""
        passes = self.passes(number, self._slots.layout)
        targets = sum(each.num_targets for each in passes)
        reseed(self.draws.step(number), self.device)
        begun = time.perf_counter()
        total = torch.zeros((), device=self.device)
        for each in passes:
            self._slots.rows.enter(self.pieces(number, each))
            with precision(self._settings.training.precision, self.device):
                loss = each.loss_sum(self._slots.model) / max(1, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self.end_step(number, passes, total)
        self.step_seconds += time.perf_counter() - begun

    def end_step(self, number: int, passes: Sequence[Pass], loss: Tensor) -> None:
        """Update by the gradients of all passes of a step; `loss` is the step's."""
        self.tokens += sum(each.num_tokens for each in passes)
        self.loss_tokens += sum(each.num_targets for each in passes)
        self.computed_tokens += sum(each.computed_tokens for each in passes)
        self.padded_tokens += self.padded_tokens_of(number)
        self._losses.append(loss)
        self._update(rate_factor(number, self.num_steps, self._settings.training))

    def padded_tokens_of(self, number: int) -> int:
        """Return the tokens of a step whose rows are padded to the longest of them."""
        lengths = [length_of(self._rows[place]) for place in self._steps[number]]
        # the last token of a row is only a target
        return len(lengths) * max(1, max(lengths) - 1)

    def _update(self, factor: float) -> None:
        training = self._settings.training
        self.installed.take_gradients()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.add_terms(gradients)
        norm = nn.utils.get_total_norm(gradients).to(self.device)
        self._gradient_norms.append(norm)
        if training.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, training.clip_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = training.learning_rate * factor
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.installed.follow_cores()

    def add_terms(self, gradients: Sequence[Tensor]) -> None:
        """Add the gradients of the terms that client side and method add to the loss.

        They are mu / 2 |theta - theta_received|^2, and the penalty of the last directions. The
        gradients are those of the trained parameters.
        """
        task = self._settings.task
        if task.tail_penalty:
            assert task.trained == "AB", "a penalty is of both factors"
            _add_tail_penalty(self.installed, gradients, task)
        if self._received:
            assert len(gradients) == len(self._received), "a factor without a gradient"
            moved = torch._foreach_sub([p.detach() for p in self._parameters], self._received)
            torch._foreach_add_(tuple(gradients), moved, alpha=self._settings.rule.mu)

    def losses(self) -> list[float]:
        """Wait for the device and return the losses of all steps."""
        begun = time.perf_counter()
        losses: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        self.step_seconds += time.perf_counter() - begun
        return [*self._earlier_losses, *losses]


def _add_tail_penalty(installed: Installed, gradients: Sequence[Tensor], task: LocalTask) -> None:
    """Add the gradient of lambda |B[:, k:]| |A[k:]| of every module."""
    count = len(installed.modules)
    for a, b, of_a, of_b in zip(
        installed.a, installed.b, gradients[:count], gradients[count:], strict=True
    ):
        begin = task.leading(a.shape[0])
        a_tail, b_tail = a.detach()[begin:], b.detach()[:, begin:]
        a_norm, b_norm = a_tail.norm(), b_tail.norm()
        # of |x| at x = 0: zero, one of its subgradients
        of_a[begin:] += task.tail_penalty * b_norm * a_tail / a_norm.clamp(min=_SMALLEST)
        of_b[:, begin:] += task.tail_penalty * a_norm * b_tail / b_norm.clamp(min=_SMALLEST)


def reseed(seed: int, device: torch.device) -> None:
    """Seed the global generators of a device."""
    # `torch.manual_seed` formats a stack for every absent accelerator: 1 ms a step
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _norms(installed: Installed) -> dict[str, tuple[float, float]]:
    with torch.no_grad():
        found = torch._foreach_norm((*installed.a, *installed.b))
        norms: list[float] = torch.stack(found).tolist()
    count = len(installed.modules)
    pairs = zip(norms[:count], norms[count:], strict=True)
    return dict(zip(installed.modules, pairs, strict=True))


def _emptied(installed: Installed) -> str:
    """Say which factor has no values, as one that was divided and not gathered; or nothing."""
    for factor, own in (("A", installed.a), ("B", installed.b)):
        for module, parameter in zip(installed.modules, own, strict=True):
            if not parameter.numel():
                return f"{module} {factor} is empty after training"
    return ""


def _failure(losses: Sequence[float], norms: dict[str, tuple[float, float]]) -> str:
    """Say what is not finite, or nothing."""
    step = next((n for n, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    where = f" (loss of step {step}: {losses[step - 1]})" if step else ""
    for module, pair in norms.items():
        for name, norm in zip("AB", pair, strict=True):
            if not math.isfinite(norm):
                return f"{module} {name} is not finite after training{where}"
    return f"the loss of step {step} is {losses[step - 1]}" if step else ""


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
