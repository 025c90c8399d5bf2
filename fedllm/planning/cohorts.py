"""Cohorts: the clients that train in a round."""

import math
import random
from collections.abc import Sequence

from fedllm.config.models import ClientsSection, Config
from fedllm.errors import ConfigError, counted
from fedllm.planning.seeding import seed_of
from fedllm.storage.records import CohortRecord

# a cohort of this expected size is empty with a probability below 1e-12
_SMALLEST_POISSON = 28


def cohort_size(section: ClientsSection, num_trainable: int) -> int:
    """Return the number of clients that train in a round, at least 1.

    With Poisson sampling it is the expected number.

    Raises:
        ConfigError: `clients.cohort.count` is above the number of clients that can train, or
            `clients.quorum` is above the cohort.
    """
    if not num_trainable:
        raise ConfigError("clients: none can train; lower clients.dev and clients.unseen")
    cohort = section.cohort
    if cohort.count is not None and cohort.count > num_trainable:
        raise ConfigError(
            f"clients.cohort.count: got {cohort.count}, only "
            f"{counted(num_trainable, 'client')} can train; lower it"
        )
    size = cohort.count or max(1, round((cohort.fraction or 0.0) * num_trainable))
    if isinstance(section.quorum, int) and section.quorum > size:
        raise ConfigError(
            f"clients.quorum: got {section.quorum}, a round draws {counted(size, 'client')}; lower "
            "it, or give `all` or a share"
        )
    return size


def refuse_empty_cohorts(config: Config, size: int) -> None:
    """Refuse cohorts of this expected size that may be empty, where nothing follows from none.

    Private clients may be none: the noise alone moves the state then.

    Raises:
        ConfigError: a Poisson cohort could be empty.
    """
    is_poisson = config.clients.cohort.sampling == "poisson"
    if is_poisson and config.privacy.clip_norm is None and size < _SMALLEST_POISSON:
        raise ConfigError(
            f"clients.cohort.sampling: poisson expects {counted(size, 'client')} a round, "
            f"which may be none; need at least {_SMALLEST_POISSON}, fixed, or privacy.clip_norm"
        )


def draw_cohort(
    section: ClientsSection, *, seed: int, round_number: int, trainable: Sequence[str]
) -> list[str]:
    """Draw the round's clients without replacement, or each by itself (Poisson sampling).

    The draw depends only on seed, round and ids. With `clients.over_sample` it has more clients
    than complete the round.

    Returns:
        Ids in canonical (sorted) order.
    """
    draw = random.Random(seed_of("cohort", seed, round_number))
    if section.cohort.sampling == "poisson":
        share = cohort_size(section, len(trainable)) / len(trainable)
        return [client for client in sorted(trainable) if draw.random() < share]
    size = math.ceil(cohort_size(section, len(trainable)) * (1.0 + section.over_sample) - 1e-9)
    return sorted(draw.sample(sorted(trainable), min(size, len(trainable))))


def quorum_size(quorum: int | float | str, cohort: int) -> int:
    """Return the number of valid updates that a round needs.

    `quorum` is `all`, a count, or a share of the cohort, which is rounded up.
    """
    if quorum == "all":
        return cohort
    if isinstance(quorum, int):
        return min(quorum, cohort)  # a Poisson cohort may be smaller
    assert isinstance(quorum, float)
    return max(1, math.ceil(quorum * cohort - 1e-9))


def quorum_of(section: ClientsSection, cohort: CohortRecord) -> int:
    """Return the number of valid updates that the round of a cohort needs."""
    return quorum_size(section.quorum, cohort.enough or len(cohort.clients))
