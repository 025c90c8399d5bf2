"""Reasons why a method cannot work with a configuration: one line, with the key and the remedy."""

from collections.abc import Mapping, Sequence


def refuse_mixed_ranks(method: str, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
    """Return a reason where two tiers' ranks differ: the method's factors have one shape."""
    for name in sorted({name for ranks in tier_ranks for name in ranks}):
        found = sorted({ranks[name] for ranks in tier_ranks if name in ranks})
        if len(found) > 1:
            return (
                f"method.name: {method} averages factors of one rank, but clients.tiers "
                f"gives {name} the ranks {', '.join(map(str, found))}: "
                f"set all to {found[0]}, or use flexlora"
            )
    return None
