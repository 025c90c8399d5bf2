"""What a run's rounds say about one client: the epsilon of differential privacy, by an accountant.

The accountant is that of the package dp-accounting (Renyi divergence). Cohorts that are drawn by
Poisson sampling are compared with those without or with one more client; cohorts of a fixed size
with those in which one client is another, whose sum differs by twice the clipping norm.
"""

from importlib.util import find_spec

from fedllm.config.models import Config
from fedllm.errors import ConfigError
from fedllm.planning.cohorts import cohort_size
from fedllm.storage.records import PrivacyRecord


def require_accountant(config: Config) -> None:
    """Refuse a private run where the accountant is not installed.

    Raises:
        ConfigError: it says what to install.
    """
    if config.privacy.clip_norm is not None and find_spec("dp_accounting") is None:
        raise ConfigError(
            "privacy.clip_norm: needs the package dp-accounting, which is not installed; install "
            "it (pip install 'fedllm[privacy]'), or set null"
        )


def privacy_after(config: Config, num_trainable: int, rounds: int) -> PrivacyRecord:
    """Return what clients' privacy is after some rounds of a private run."""
    import dp_accounting
    from dp_accounting import rdp

    section = config.privacy
    assert section.clip_norm is not None
    size = cohort_size(config.clients, num_trainable)
    multiplier, relation = section.noise_multiplier, dp_accounting.NeighboringRelation
    if config.clients.cohort.sampling == "poisson":
        accountant = rdp.RdpAccountant(neighboring_relation=relation.ADD_OR_REMOVE_ONE)
        gaussian = dp_accounting.GaussianDpEvent(multiplier)
        event = dp_accounting.PoissonSampledDpEvent(size / num_trainable, gaussian)
    else:
        accountant = rdp.RdpAccountant(neighboring_relation=relation.REPLACE_ONE)
        gaussian = dp_accounting.GaussianDpEvent(multiplier / 2)
        event = dp_accounting.SampledWithoutReplacementDpEvent(num_trainable, size, gaussian)
    accountant.compose(event, rounds)
    return PrivacyRecord(
        epsilon=float(accountant.get_epsilon(section.delta)),
        delta=section.delta,
        clip_norm=section.clip_norm,
        noise_multiplier=multiplier,
        sampling=config.clients.cohort.sampling,
        cohort=size,
        clients=num_trainable,
    )
