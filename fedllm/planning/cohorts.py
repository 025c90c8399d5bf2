"""Cohorts: the clients that train in a round."""

import math
import random
from collections.abc import Sequence

from fedllm.config.models import ClientsSection
from fedllm.errors import ConfigError
from fedllm.planning.seeding import seed_of
from fedllm.storage.records import CohortRecord


def cohort_size(section: ClientsSection, num_trainable: int) -> int:
    """Return the number of clients that train in a round, at least 1.

    Raises:
        ConfigError: `clients.cohort.count` is above the number of clients that can train.
    """
    if not num_trainable:
        raise ConfigError("clients: none can train; lower clients.dev and clients.unseen")
    cohort = section.cohort
    if cohort.count is None:
        assert cohort.fraction is not None
        return max(1, round(cohort.fraction * num_trainable))
    if cohort.count > num_trainable:
        raise ConfigError(
            f"clients.cohort.count: got {cohort.count}, only {num_trainable} clients can train; "
            "lower it"
        )
    return cohort.count


def draw_cohort(
    section: ClientsSection, *, seed: int, round_number: int, trainable: Sequence[str]
) -> list[str]:
    """Draw the round's clients without replacement.

    The draw depends only on seed, round and ids. With `clients.over_sample` it has more clients
    than complete the round.

    Returns:
        Ids in canonical (sorted) order.
    """
    draw = random.Random(seed_of("cohort", seed, round_number))
    size = math.ceil(cohort_size(section, len(trainable)) * (1.0 + section.over_sample) - 1e-9)
    return sorted(draw.sample(sorted(trainable), min(size, len(trainable))))


def quorum_size(quorum: int | float | str, cohort: int) -> int:
    """Return the number of valid updates that a round needs.

    `quorum` is `all`, a count, or a share of the cohort, which is rounded up.
    """
    if quorum == "all":
        return cohort
    if isinstance(quorum, int):
        return min(quorum, cohort)
    assert isinstance(quorum, float)
    return max(1, math.ceil(quorum * cohort - 1e-9))


def quorum_of(section: ClientsSection, cohort: CohortRecord) -> int:
    """Return the number of valid updates that the round of a cohort needs."""
    return quorum_size(section.quorum, cohort.enough or len(cohort.clients))
