"""The server's own optimizer: it moves the state by more than the change of one round.

Reddi et al., ICLR 2021, https://arxiv.org/abs/2003.00295: the change of a round, D = x' - x, is a
gradient to the server, x' what the method makes of the updates and x the state before.
`fedavgm` (Hsu et al., https://arxiv.org/abs/1909.06335) has momentum: v <- beta v + D,
x <- x + eta v. Since v is the last movement over eta, x + beta (x - x_last) + eta D is the same,
which needs the last state alone: a state in factors stays in factors, whatever its rank.
`fedadam` and `fedyogi` have a rate for every entry: m <- beta1 m + (1 - beta1) D,
x <- x + eta m / (sqrt(v) + tau), with v <- beta2 v + (1 - beta2) D^2 in Adam and
v <- v - (1 - beta2) D^2 sign(v - D^2) in Yogi; v begins at tau^2, and nothing corrects the bias.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from fedllm.config.models import Section
from fedllm.methods.options import AdaptiveOptions, FedAvgMOptions

Kept: TypeAlias = Mapping[str, Tensor]  # name -> what is kept of one tensor of the state


class ServerSide(Protocol):
    """An optimizer of the server; `keeps` are the tensors that it keeps for each of the state's."""

    keeps: ClassVar[tuple[str, ...]]

    def start(self, value: Tensor) -> Kept:
        """Return what is kept of a tensor of the first state."""

    def move(self, new: Tensor, before: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """Return a tensor of the next state and what is kept of it.

        Args:
            new: what the method makes of the updates.
            before: the state before the round.
            kept: as `start` or the round before returned it.
        """


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """FedAvgM, by the state before the last one."""

    keeps: ClassVar[tuple[str, ...]] = ("last",)

    options: FedAvgMOptions

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """What the method's result, the state before and the last one count."""
        rate, momentum = self.options.learning_rate, self.options.momentum
        return rate, 1.0 + momentum - rate, -momentum

    def start(self, value: Tensor) -> Kept:
        """Return the first state: nothing has moved."""
        return {"last": value}

    def move(self, new: Tensor, before: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """Return x + beta (x - x_last) + eta D."""
        if self.is_still:
            return new, {"last": before}
        terms = (new, before, kept["last"])
        moved = sum(
            (c * t.double() for c, t in zip(self.coefficients, terms, strict=True)),
            torch.zeros((), dtype=torch.float64, device=new.device),
        )
        return moved, {"last": before}

    @property
    def is_still(self) -> bool:
        """Whether the next state is what the method makes, to the bit."""
        return self.coefficients == (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """FedAdam or FedYogi: `second` says how the second moment follows the squared change."""

    keeps: ClassVar[tuple[str, ...]] = ("first", "second")

    options: AdaptiveOptions
    second: Callable[[Tensor, Tensor], Tensor]

    def start(self, value: Tensor) -> Kept:
        """Return moments of no change."""
        return {
            "first": torch.zeros_like(value),
            "second": torch.full_like(value, self.options.tau**2),
        }

    def move(self, new: Tensor, before: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """Return x + eta m / (sqrt(v) + tau)."""
        given = self.options
        x, change = before.double(), new.double() - before.double()
        first = given.beta1 * kept["first"].double() + (1 - given.beta1) * change
        gap = self.second(kept["second"].double(), change.square())
        second = kept["second"].double() + (1 - given.beta2) * gap
        moved = x + given.learning_rate * first / (second.sqrt() + given.tau)
        return moved, {"first": first, "second": second}


def _adam(second: Tensor, squared: Tensor) -> Tensor:
    return squared - second


def _yogi(second: Tensor, squared: Tensor) -> Tensor:
    return squared * (squared - second).sign()


def _momentum(options: Section) -> ServerSide:
    assert isinstance(options, FedAvgMOptions)
    return Momentum(options=options)


def _adaptive(second: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Section], ServerSide]:
    def made(options: Section) -> ServerSide:
        assert isinstance(options, AdaptiveOptions)
        return Adaptive(options=options, second=second)

    return made


SERVER_SIDES: Mapping[str, Callable[[Section], ServerSide]] = {
    "fedavgm": _momentum,
    "fedadam": _adaptive(_adam),
    "fedyogi": _adaptive(_yogi),
}
