"""How long clients train: from tokens, ranks and model size, then from what rounds took."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.config.models import TrainingSection
from fedllm.storage.records import ClientRecord, CohortClient, ModuleRecord, TierMix

# A client of any size costs its installation, its optimizer and its share of a file.
SECONDS_PER_CLIENT = 0.05
_TERA = 1e12


def training_cost(client: ClientRecord, training: TrainingSection) -> float:
    """Return the tokens that a client is expected to compute in a round."""
    rows = client.train_rows * training.epochs
    if training.max_steps is not None:
        rows = min(rows, training.max_steps * training.batch_size)
    return rows * client.train_tokens / max(1, client.train_rows)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Estimated seconds of training, per tier and token; `calibrated` once rounds were timed."""

    seconds_per_token: Mapping[str, float]
    calibrated: bool = False

    def seconds(self, client: CohortClient) -> float:
        """Return how long a client of a cohort is expected to train."""
        return SECONDS_PER_CLIENT + client.cost * self.seconds_per_token[client.tier]


def adapter_weights(ranks: Mapping[str, int], modules: Mapping[str, ModuleRecord]) -> int:
    """Return how many weights an adapter has: those of A and B at each module's rank."""
    return sum(
        rank * (modules[name].out_features + modules[name].in_features)
        for name, rank in ranks.items()
    )


def seed_costs(
    *,
    model_parameters: int,
    modules: Mapping[str, ModuleRecord],
    ranks: Mapping[str, Mapping[str, int]],
    teraflops: Mapping[str, float],
) -> CostModel:
    """Return what is known before anything was timed.

    A token takes two operations per weight in the forward pass and two in the backward pass,
    which has no gradient of frozen weights; adapter weights take two more.

    Args:
        model_parameters: of the base.
        modules: the target modules.
        ranks: tier -> module -> rank.
        teraflops: tier -> sustained speed of its workers, in 10^12 operations a second.
    """
    seconds = {}
    for tier, per_module in ranks.items():
        operations = 4.0 * model_parameters + 6.0 * adapter_weights(per_module, modules)
        seconds[tier] = operations / (_TERA * teraflops[tier])
    return CostModel(seconds_per_token=seconds)


def calibrate(seeded: CostModel, measured: Mapping[str, TierMix]) -> CostModel:
    """Return the costs that a round's measured seconds tell.

    A tier that was not measured takes over by how much the others differ from their seed.
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
