"""Presets: settings of the field that a configuration takes as its defaults."""

from collections.abc import Mapping
from typing import Any

from fedllm.errors import ConfigError

PRESETS_KEY = "presets"

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # a few of many clients in a round, as FlexLoRA (2402.11505): 1,613 clients, 5 %
    "cross-device": {
        "clients": {"cohort": {"fraction": 0.05}},
        "data": {"partition": {"clients": 1613}},
    },
    # a handful of owners, of whom all take part in every round
    "cross-silo": {
        "clients": {"cohort": {"fraction": 1.0}},
        "data": {"partition": {"clients": 16}},
    },
    # the ranks of FLoRA (2409.05976) and FLoRIST (2506.09199): 64 32 16 16 8 8 4 4 4 4
    "ranks-4-64": {
        "clients": {
            "tiers": {
                f"rank-{rank}": {"ranks": rank, "share": share}
                for rank, share in ((4, 40), (8, 20), (16, 20), (32, 10), (64, 10))
            }
        }
    },
    "ranks-2-64": {
        "clients": {"tiers": {f"rank-{rank}": {"ranks": rank} for rank in (2, 4, 8, 16, 32, 64)}}
    },
}
# what a configuration says of these replaces all that a preset says
_WHOLE = (("clients", "tiers"), ("clients", "cohort"))


def with_presets(raw: Mapping[str, Any], names: Any) -> dict[str, Any]:
    """Return raw keys and values with those of presets where they have none.

    Args:
        raw: keys and values of a configuration.
        names: the presets; of two that set one key, the later one counts.

    Raises:
        ConfigError: there is no such preset.
    """
    if not isinstance(names, list):
        raise ConfigError(f"{PRESETS_KEY}: got {names!r}, need a list of {', '.join(PRESETS)}")
    merged: dict[str, Any] = {}
    for name in names:
        if name not in PRESETS:
            raise ConfigError(f"{PRESETS_KEY}: got {name!r}, need some of {', '.join(PRESETS)}")
        merged = _over(merged, PRESETS[name], ())
    return _over(merged, raw, ())


def _over(
    below: Mapping[str, Any], above: Mapping[str, Any], path: tuple[str, ...]
) -> dict[str, Any]:
    """Return two tables as one; the values of `above` count."""
    both = dict(below)
    for key, value in above.items():
        here = (*path, key)
        under = both.get(key)
        if isinstance(under, dict) and isinstance(value, dict) and here not in _WHOLE:
            both[key] = _over(under, value, here)
        elif value is not None or key not in both:
            both[key] = value
    return both
