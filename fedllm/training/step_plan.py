"""What a client's optimizer steps are: rows, seeds and learning rates, pure."""

import math
from dataclasses import dataclass

import torch

from fedllm.config.models import TrainingSection
from fedllm.planning.seeding import seed_of


@dataclass(frozen=True, kw_only=True)
class Draws:
    """All randomness of one client in one round, as a function of their identity."""

    seed: int
    round: int
    client: str

    def order(self, epoch: int) -> int:
        """Return the seed of an epoch's order of rows."""
        return self._of("order", epoch)

    def step(self, step: int) -> int:
        """Return the seed of an optimizer step."""
        return self._of("step", step)

    def row(self, step: int, place: int) -> int:
        """Return the seed of the row at `place` of an optimizer step."""
        return self._of("row", step, place)

    def prefix(self, step: int) -> int:
        """Return the seed of what the rows of an optimizer step have in common."""
        return self._of("prefix", step)

    def _of(self, *what: str | int) -> int:
        return seed_of(self.seed, self.round, self.client, *what)


def plan_steps(num_rows: int, training: TrainingSection, draws: Draws) -> list[list[int]]:
    """Return the row indices of every optimizer step.

    Every epoch visits all rows once in its own order and ends with what is left of a batch;
    `max_steps` ends the training earlier.
    """
    steps: list[list[int]] = []
    size = training.batch_size
    for epoch in range(training.epochs):
        if training.max_steps is not None and len(steps) >= training.max_steps:
            break
        shuffle = torch.Generator().manual_seed(draws.order(epoch))
        order = torch.randperm(num_rows, generator=shuffle).tolist()
        steps += [order[start : start + size] for start in range(0, num_rows, size)]
    return steps[: training.max_steps]


def training_at(training: TrainingSection, round_number: int) -> TrainingSection:
    """Return the training of a round: every cut up to it has lowered the learning rate."""
    cuts = sum(cut <= round_number for cut in training.cut_rounds)
    if not cuts:
        return training
    rate = training.learning_rate * training.cut_factor**cuts
    return training.model_copy(update={"learning_rate": rate})


def rate_factor(step: int, num_steps: int, training: TrainingSection) -> float:
    """Return the share of the learning rate at `step` (from 0) of a client's own steps.

    It rises linearly for `warmup_steps`, then stays, or falls to zero just after the last step.
    """
    warmup = training.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (num_steps - warmup)
    if training.schedule == "linear":
        return 1.0 - progress
    if training.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
