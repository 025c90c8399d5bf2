"""The noise of client-level differential privacy (DP-FedAvg, https://arxiv.org/abs/1710.06963).

The sum of the clients' clipped changes gets normal noise of standard deviation z C in every entry,
C the largest norm of a change, z the noise multiplier. It is drawn from the run's seed, the round,
the module and the part of the sum, so that a resumed run has the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.methods.protocol import ServerStep
from fedllm.planning.seeding import seed_of


def noise(step: ServerStep, part: str, shape: Sequence[int], *, seed: int) -> Tensor:
    """Return the noise of a part of the sums of the step's G modules, float64 (G, *shape)."""
    drawn = []
    for module in step.modules:
        draws = torch.Generator().manual_seed(seed_of(seed, "privacy", step.round, module, part))
        drawn.append(torch.randn(*shape, generator=draws, dtype=torch.float64))
    return step.noise_std * torch.stack(drawn).to(step.before[0][_first(step)].device)


def _first(step: ServerStep) -> str:
    return next(iter(step.before[0]))
