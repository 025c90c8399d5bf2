"""Quotas: shares turned into whole numbers."""

from collections.abc import Mapping


def largest_remainder(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Split `total` in proportion to `shares` by the largest remainder method.

    The counts sum to `total`. Ties go to the earlier key. Shares must not sum to zero.
    """
    sum_of_shares = sum(shares.values())
    assert sum_of_shares > 0, "shares sum to zero"
    ideal = {key: total * share / sum_of_shares for key, share in shares.items()}
    counts = {key: int(value) for key, value in ideal.items()}
    rest = total - sum(counts.values())
    # rounded, since 0.1 * 3 and 0.3 are the same remainder but differ as floats
    by_remainder = sorted(ideal, key=lambda key: -round(ideal[key] - counts[key], 9))
    for key in by_remainder[:rest]:
        counts[key] += 1
    return counts
