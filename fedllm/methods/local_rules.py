"""The client's side of a method: which optimizer trains, with what is fixed about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """How a client trains: the optimizer follows from `method.local`, with PyTorch's defaults.

    `momentum` belongs to SGD, `betas` and `eps` to AdamW; learning rate and schedule are the
    configuration's. An optimizer's state ends with the round. `mu` is the weight of FedProx's
    proximal term, mu / 2 |theta - theta_received|^2 over the factors that train.
    """

    optimizer: Literal["sgd", "adamw"]
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    mu: float = 0.0


LOCAL_RULES: Mapping[str, LocalRule] = {
    "fedavg": LocalRule(optimizer="sgd"),  # arXiv 1602.05629
    "fedit": LocalRule(optimizer="adamw"),  # arXiv 2305.05644
    # Li et al., MLSys 2020, https://arxiv.org/abs/1812.06127: the local loss plus the proximal term
    "fedprox": LocalRule(optimizer="sgd", mu=0.01),
}
