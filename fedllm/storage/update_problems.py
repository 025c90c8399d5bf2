"""Checks of an update against what the server knew of the client before it read the update."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedllm.storage.records import UpdateRecord
from fedllm.storage.updates import PublishedUpdate

# a change of this norm, weighted by a client's rows, is far below what float32 holds
_MAX_CHANGE = 1e30
_MAX_COUNT = 2**53
_SCALE_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The contents of a client's update that are known before it comes.

    Attributes:
        ranks: the rank of each module that the client has to train.
        sides: (out, in) of each module.
        max_rows: the client's training rows.
        scales: the scale of each module; None: a user's own method decides it.
        sent: the factors that it has.
    """

    ranks: Mapping[str, int]
    sides: Mapping[str, tuple[int, int]]
    max_rows: int
    scales: Mapping[str, float] | None = None
    sent: str = "AB"


def update_problem(update: PublishedUpdate, expected: Expected) -> str | None:
    """Say what is wrong with an update, or None; a failed one has no tensors.

    A client's word is no proof: rows become its weight, scale and norms the size of its change.
    """
    record = update.record
    if problem := next(_number_problems(record, expected.max_rows), None):
        return problem
    if record.status == "failed":
        return None
    return (
        _shape_problem(update, expected)
        or _scale_problem(record, expected)
        or _norm_problem(record, expected.ranks)
    )


def _shape_problem(update: PublishedUpdate, expected: Expected) -> str | None:
    """Say what is wrong with the shapes of an update that did not fail, or None."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, rank in expected.ranks.items():
        out_features, in_features = expected.sides[module]
        of_module = {"A": (rank, in_features), "B": (out_features, rank)}
        shapes |= {f"{module}|{factor}": of_module[factor] for factor in expected.sent}
    for name, shape in shapes.items():
        if update.shapes.get(name) != shape:
            return f"{name.replace('|', ' ')} has shape {update.shapes.get(name)}, need {shape}"
    extra = sorted(set(update.shapes) - set(shapes))
    return f"{extra[0].replace('|', ' ')} is unexpected" if extra else None


def _number_problems(record: UpdateRecord, max_rows: int) -> Iterator[str]:
    if record.rows > max_rows:
        yield f"it trained {_short(record.rows)} rows, and the client has {max_rows}"
    counts = ("steps", "tokens", "loss_tokens", "peak_memory_bytes")
    for name in counts:
        value = getattr(record, name)
        if not 0 <= value < _MAX_COUNT:
            yield f"{name} is {_short(value)}, need a number from 0 to 2**53"
    for name in ("seconds", "step_seconds"):
        value = getattr(record, name)
        if not 0 <= value < math.inf:
            yield f"{name} is {value}, need a finite number >= 0"
    energy = record.energy_joules
    if energy is not None and not 0 <= energy < math.inf:
        yield f"energy_joules is {energy}, need a finite number >= 0"
    if record.status == "ok" and not all(map(math.isfinite, record.losses)):
        yield "a loss is not finite, and the client did not fail"


def _scale_problem(record: UpdateRecord, expected: Expected) -> str | None:
    for module, scale in (expected.scales or {}).items():
        if not math.isclose(record.scales[module], scale, rel_tol=_SCALE_TOLERANCE):
            return f"{module} has the scale {record.scales[module]}, need {scale}"
    return None


def _norm_problem(record: UpdateRecord, ranks: Mapping[str, int]) -> str | None:
    for module in sorted(ranks):
        norms = record.norms.get(module)
        if norms is None:
            return f"{module} has no norms of A and B in its record"
        change = abs(record.scales[module]) * norms[0] * norms[1]
        if not change <= _MAX_CHANGE:
            return f"{module} changes by up to {change:.3g}, need at most {_MAX_CHANGE:.0e}"
    return None


def _short(number: int) -> str:
    """Return a number in few characters, however large it is."""
    return str(number) if abs(number) < _MAX_COUNT else "more than 2**53"
