"""Costs of clients: seconds of training, estimated and then measured; memory of a process."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.config.models import TrainingSection
from fedllm.storage.records import ClientRecord, CohortClient, ModuleRecord, TierMix

# Every client costs this much for its adapter, its optimizer and its share of a file.
SECONDS_PER_CLIENT = 0.05
_TERA = 1e12
_DIVIDES_BASE = 3  # the stage of ZeRO
_WHOLE_LAYERS = 2  # one that computes, and the next one
_ADAMW = 2


def training_cost(client: ClientRecord, training: TrainingSection) -> float:
    """Return the expected tokens that a client trains on in a round."""
    rows = client.train_rows * training.epochs
    if training.max_steps is not None:
        rows = min(rows, training.max_steps * training.batch_size)
    return rows * client.train_tokens / max(1, client.train_rows)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Costs in seconds of training per token and tier; `calibrated` if a round was measured."""

    seconds_per_token: Mapping[str, float]
    calibrated: bool = False

    def seconds(self, client: CohortClient) -> float:
        """Return the expected seconds of training of a client."""
        return SECONDS_PER_CLIENT + client.cost * self.seconds_per_token[client.tier]


def adapter_weights(ranks: Mapping[str, int], modules: Mapping[str, ModuleRecord]) -> int:
    """Return the number of weights of an adapter: those of A and B at each module's rank."""
    return sum(
        rank * (modules[name].out_features + modules[name].in_features)
        for name, rank in ranks.items()
    )


def training_operations(model_parameters: int, adapter: int) -> float:
    """Return the floating-point operations of training per token.

    A token takes two operations per weight in the forward pass and two in the backward pass.
    Adapter weights take two more for their gradient, which frozen weights do not have. Attention
    between tokens is not counted.

    Args:
        model_parameters: number of weights of the base.
        adapter: number of weights of the adapter.
    """
    return 4.0 * model_parameters + 6.0 * adapter


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Bytes that a process needs at least while it trains; activations come on top.

    Attributes:
        weights: of the base: its part, and the layers that are whole while they compute.
        adapter: A and B in float32.
        gradients: of the adapter, whole in every process before they are summed.
        optimizer: two numbers for each weight of the adapter (AdamW), and ZeRO's own copy of it.
    """

    weights: float
    adapter: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.weights + self.adapter + self.gradients + self.optimizer


def process_memory(
    *,
    base_bytes: float,
    modules: Mapping[str, ModuleRecord],
    ranks: Mapping[str, int],
    processes: int = 1,
    stage: int | None = None,
) -> ProcessMemory:
    """Return the memory of one of the processes that train a client together.

    Args:
        base_bytes: of all weights of the base.
        modules: the target modules.
        ranks: module -> rank.
        processes: number of processes.
        stage: stage of ZeRO; None: every process has everything.
    """
    base, adapter = base_bytes, 4.0 * adapter_weights(ranks, modules)
    weights = base
    if stage == _DIVIDES_BASE and processes > 1:
        weights = min(base, base / processes + _WHOLE_LAYERS * base / _num_layers(modules))
    copies = _ADAMW if stage is None else (_ADAMW + 1) / processes
    return ProcessMemory(
        weights=weights, adapter=adapter, gradients=adapter, optimizer=copies * adapter
    )


def _num_layers(modules: Mapping[str, ModuleRecord]) -> int:
    """Return the number of layers, by the first number in the paths of the target modules."""
    found = (re.search(r"\.(\d+)\.", name) for name in modules)
    return max((1 + int(number[1]) for number in found if number), default=1)


def seed_costs(
    *,
    model_parameters: int,
    modules: Mapping[str, ModuleRecord],
    ranks: Mapping[str, Mapping[str, int]],
    teraflops: Mapping[str, float],
) -> CostModel:
    """Return the costs before any round was measured.

    Args:
        model_parameters: number of weights of the base.
        modules: the target modules.
        ranks: tier -> module -> rank.
        teraflops: tier -> sustained speed of its workers, in 10^12 operations a second.
    """
    seconds = {}
    for tier, per_module in ranks.items():
        operations = training_operations(model_parameters, adapter_weights(per_module, modules))
        seconds[tier] = operations / (_TERA * teraflops[tier])
    return CostModel(seconds_per_token=seconds)


def calibrate(seeded: CostModel, measured: Mapping[str, TierMix]) -> CostModel:
    """Return the costs measured in a round.

    The seed costs of a tier without a measurement are scaled by the ratio of measured to seed costs
    of the other tiers.

    Args:
        seeded: costs before any round was measured.
        measured: tier -> its clients, tokens and seconds in the round.
    """
    trained = {tier: mix for tier, mix in measured.items() if mix.used and mix.tokens > 0}
    trained = {tier: mix for tier, mix in trained.items() if tier in seeded.seconds_per_token}
    if not trained:
        return seeded
    expected = sum(seeded.seconds_per_token[t] * mix.tokens for t, mix in trained.items())
    factor = sum(_token_seconds(mix) for mix in trained.values()) / expected
    return CostModel(
        seconds_per_token={
            tier: _token_seconds(trained[tier]) / trained[tier].tokens
            if tier in trained
            else seed * factor
            for tier, seed in seeded.seconds_per_token.items()
        },
        calibrated=True,
    )


def _token_seconds(mix: TierMix) -> float:
    return max(mix.seconds - SECONDS_PER_CLIENT * mix.used, 1e-9)
