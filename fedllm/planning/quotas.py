"""Shares to whole numbers."""

from collections.abc import Mapping


def largest_remainder(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Split `total` in proportion to `shares`, exactly: the largest remainders are rounded up.

    Ties go to the earlier key. The counts sum to `total`; shares must not sum to zero.
    """
    whole = sum(shares.values())
    assert whole > 0, "shares sum to zero"
    ideal = {key: total * share / whole for key, share in shares.items()}
    counts = {key: int(value) for key, value in ideal.items()}
    left = total - sum(counts.values())
    # rounding hides that 0.1 * 3 and 0.3 are the same remainder
    by_remainder = sorted(ideal, key=lambda key: -round(ideal[key] - counts[key], 9))
    for key in by_remainder[:left]:
        counts[key] += 1
    return counts
