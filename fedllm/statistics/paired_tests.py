"""Paired tests and the adjustment of their p-values.

No p-value is below the smallest that its test can give: with few pairs that is large.
"""

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedllm.planning.seeding import seed_of

K = TypeVar("K", bound=Hashable)

# up to here all sign patterns are counted, above they are drawn
EXACT_SIGN_FLIPS = 16
DRAWN_SIGN_FLIPS = 20_000
# up to here the distribution of the rank sum is counted, above it is taken as normal
EXACT_RANK_SUMS = 50


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """A two-sided test: its p-value, the smallest that it can give, and the number of pairs."""

    p: float
    smallest: float
    pairs: int


def sign_flip_test(differences: Sequence[float]) -> PairedTest:
    """Test whether the mean of differences is zero, by the signs that they could have had.

    If the two sides are exchangeable, every difference could as well have the other sign. The
    p-value is the share of all sign patterns whose mean is at least as far from zero (Fisher 1935,
    The Design of Experiments, section 21). Above 16 differences, 20,000 patterns are drawn.
    """
    assert differences, "no differences"
    count = len(differences)
    smallest = 2.0**-count * 2
    observed = abs(math.fsum(differences))
    # sums in another order have other last digits
    limit = observed - 1e-9 * math.fsum(map(abs, differences))
    if count <= EXACT_SIGN_FLIPS:
        sums = [0.0]
        for value in differences:
            sums = [total + sign * value for total in sums for sign in (1, -1)]
        return PairedTest(
            p=sum(abs(total) >= limit for total in sums) / len(sums),
            smallest=smallest,
            pairs=count,
        )
    draw = random.Random(seed_of("sign flips", count))
    as_far = sum(
        abs(sum(value if draw.random() < 0.5 else -value for value in differences)) >= limit
        for _ in range(DRAWN_SIGN_FLIPS)
    )
    # the observed pattern is one of those that were possible
    p = (as_far + 1) / (DRAWN_SIGN_FLIPS + 1)
    return PairedTest(p=p, smallest=1 / (DRAWN_SIGN_FLIPS + 1), pairs=count)


def signed_rank_test(differences: Sequence[float]) -> PairedTest:
    """Test whether differences are symmetric around zero, by their signed ranks.

    Differences of zero are left out, equal ones share their mean rank (Wilcoxon 1945, Biometrics
    Bulletin 1(6)). Up to 50 differences the distribution is exact, ties included; above it is
    normal, with corrections for ties and continuity.
    """
    values = [value for value in differences if value]
    if not values:
        return PairedTest(p=1.0, smallest=1.0, pairs=0)
    doubled = _doubled_ranks([abs(value) for value in values])
    positive = sum(rank for rank, value in zip(doubled, values, strict=True) if value > 0)
    count = len(values)
    smallest = min(1.0, 2.0**-count * 2)
    p = (_exact_tails if count <= EXACT_RANK_SUMS else _normal_tails)(doubled, positive)
    return PairedTest(p=max(smallest, p), smallest=smallest, pairs=count)


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Return p-values adjusted for their number (Holm 1979, Scand. J. Statist. 6(2))."""
    adjusted: dict[K, float] = {}
    largest = 0.0
    for place, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[key]))
        adjusted[key] = largest
    return {key: adjusted[key] for key in p_values}


def _doubled_ranks(sizes: Sequence[float]) -> list[int]:
    """Return twice the mean rank of every size: whole numbers, ties included."""
    counts = Counter(sizes)
    doubled: dict[float, int] = {}
    below = 0
    for size in sorted(counts):
        doubled[size] = 2 * below + counts[size] + 1
        below += counts[size]
    return [doubled[size] for size in sizes]


def _exact_tails(doubled: Sequence[int], positive: int) -> float:
    """Return twice the smaller tail of the sum of the positive ranks, at most 1."""
    # patterns[s]: the number of sign patterns whose positive ranks sum to s
    patterns: list[int] = [1] + [0] * sum(doubled)
    for rank in doubled:
        for total in range(len(patterns) - 1, rank - 1, -1):
            patterns[total] += patterns[total - rank]
    tail: int = min(sum(patterns[: positive + 1]), sum(patterns[positive:]))
    return min(1.0, 2 * tail / (1 << len(doubled)))


def _normal_tails(doubled: Sequence[int], positive: int) -> float:
    mean = sum(doubled) / 2
    # the variance of a sum of independent signs, which has ties in it
    deviation = math.sqrt(sum(rank * rank for rank in doubled)) / 2
    # ranks are doubled, so half a rank is one
    distance = max(0.0, abs(positive - mean) - 1.0)
    return math.erfc(distance / deviation / math.sqrt(2))
