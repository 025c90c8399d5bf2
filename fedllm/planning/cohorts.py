"""Who trains in a round."""

import math
import random
from collections.abc import Sequence

from fedllm.config.models import ClientsSection
from fedllm.errors import ConfigError
from fedllm.planning.seeding import seed_of
from fedllm.storage.records import CohortRecord


def cohort_size(section: ClientsSection, num_trainable: int) -> int:
    """Return how many clients train in a round, at least one.

    Raises:
        ConfigError: more are asked for than can train.
    """
    if not num_trainable:
        raise ConfigError("clients: none can train; lower clients.dev and clients.unseen")
    wanted = section.cohort
    if wanted.count is None:
        assert wanted.fraction is not None
        return max(1, round(wanted.fraction * num_trainable))
    if wanted.count > num_trainable:
        raise ConfigError(
            f"clients.cohort.count: got {wanted.count}, only {num_trainable} clients can train; "
            "lower it"
        )
    return wanted.count


def draw_cohort(
    section: ClientsSection, *, seed: int, round_number: int, trainable: Sequence[str]
) -> list[str]:
    """Draw the round's clients without replacement; a function of seed, round and ids alone.

    With `clients.over_sample` there are more of them than complete the round.

    Returns:
        Ids in canonical (sorted) order.
    """
    draw = random.Random(seed_of("cohort", seed, round_number))
    size = math.ceil(cohort_size(section, len(trainable)) * (1.0 + section.over_sample) - 1e-9)
    return sorted(draw.sample(sorted(trainable), min(size, len(trainable))))


def quorum_size(quorum: int | float | str, cohort: int) -> int:
    """Return how many valid updates a round needs: `all`, a count, or a share rounded up."""
    if quorum == "all":
        return cohort
    if isinstance(quorum, int):
        return min(quorum, cohort)
    assert isinstance(quorum, float)
    return max(1, math.ceil(quorum * cohort - 1e-9))


def quorum_of(section: ClientsSection, cohort: CohortRecord) -> int:
    """Return how many valid updates the round of a cohort needs."""
    return quorum_size(section.quorum, cohort.enough or len(cohort.clients))
