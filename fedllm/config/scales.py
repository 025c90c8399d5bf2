"""Scales of adapters: what the product of B and A is multiplied with."""

import math
from collections.abc import Callable, Mapping

from fedllm.config.models import Config, is_own
from fedllm.errors import ConfigError

SCALES: Mapping[str, Callable[[float, int], float]] = {
    "fixed": lambda alpha, rank: alpha / rank,
    "proportional": lambda _alpha, _rank: 2.0,  # alpha = 2 r, whatever `alpha` says
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


def scale_of(*, alpha: float, scaling: str, rank: int) -> float:
    """Return the scale of an adapter of `rank`.

    `fixed` is alpha / r (the paper's), `proportional` is 2 (alpha = 2r), `rslora` is
    alpha / sqrt(r) (arXiv 2312.03732).

    Raises:
        ConfigError: an unknown `scaling`.
    """
    assert rank >= 1, f"rank {rank}"
    if scaling not in SCALES:
        raise ConfigError(f"scaling: got {scaling!r}, need one of {', '.join(SCALES)}")
    return SCALES[scaling](alpha, rank)


def client_scales(config: Config, ranks: Mapping[str, int]) -> dict[str, float] | None:
    """Return the scale of each module of a client.

    Args:
        config: the configuration of the run.
        ranks: the rank of each module.

    Returns:
        Module -> scale; None for a user's own method, which may choose other scales.
    """
    if is_own(config.method.name):
        return None
    lora = config.lora
    return {
        module: scale_of(alpha=lora.alpha, scaling=lora.scaling, rank=rank)
        for module, rank in ranks.items()
    }
