"""The optimizers that `method.local` asks for."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fedllm.config.models import TrainingSection
from fedllm.methods.local_rules import LocalRule

_Build = Callable[[Sequence[nn.Parameter], LocalRule, TrainingSection], Optimizer]


def _adamw(
    parameters: Sequence[nn.Parameter], rule: LocalRule, training: TrainingSection
) -> Optimizer:
    return AdamW(
        parameters,
        lr=training.learning_rate,
        betas=rule.betas,
        eps=rule.eps,
        weight_decay=training.weight_decay,
        fused=True,  # one kernel for all factors: they are many and small
    )


def _sgd(
    parameters: Sequence[nn.Parameter], rule: LocalRule, training: TrainingSection
) -> Optimizer:
    return SGD(
        parameters,
        lr=training.learning_rate,
        momentum=rule.momentum,
        weight_decay=training.weight_decay,
        fused=True,
    )


_OPTIMIZERS: Mapping[str, _Build] = {"adamw": _adamw, "sgd": _sgd}


def build_optimizer(
    parameters: Sequence[nn.Parameter], rule: LocalRule, training: TrainingSection
) -> Optimizer:
    """Return a new optimizer over `parameters`; its state ends with the client's round."""
    return _OPTIMIZERS[rule.optimizer](parameters, rule, training)
