"""Experiment: a run as a tracker names it, and the rounds that it is given."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run as a tracker names it.

    Attributes:
        run_id: the id of the run; a tracker that is asked again goes on with it.
        name: the name of the run directory, of a sweep's run with those of its arm and seed.
        keys: the keys of the configuration, by their dotted names.
        folder: where a tracker that writes files may write them.
    """

    run_id: str
    name: str
    keys: Mapping[str, Any]
    folder: Path


def numbers_of(row: Row) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a round that are finite numbers; its own number is none of them."""
    for name, value in row.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and name != "round" and math.isfinite(float(str(value))):
            yield name, float(str(value))
