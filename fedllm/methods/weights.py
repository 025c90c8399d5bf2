"""Clients' weights from what each one trained on (FedAvg, arXiv 1602.05629): its rows.

They are divided by their sum at the end, so that a client that is left out changes no other's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.aggregation.route_types import Problem
from fedllm.errors import DataError


def amounts(rows: Sequence[float]) -> list[float]:
    """Return `rows` as weights, not normalised.

    Raises:
        DataError: an amount is negative or not finite.
    """
    for place, amount in enumerate(rows):
        if not (math.isfinite(amount) and amount >= 0):
            raise DataError(f"weight {place + 1} is {amount}: need a finite number >= 0")
    return [float(amount) for amount in rows]


def total_of(weights: Sequence[float]) -> float:
    """Return what weights sum to, whatever their order.

    Raises:
        DataError: they sum to zero, or to more than a number holds.
    """
    try:
        total = math.fsum(weights)
    except OverflowError as error:
        raise DataError(
            f"{len(weights)} weights sum to more than a number holds: divide all by the largest"
        ) from error
    if total == 0:
        raise DataError(f"all {len(weights)} weights are zero: give at least one a weight above 0")
    return total


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights over their sum: sizes that a square still holds.

    Raises:
        DataError: as `total_of`.
    """
    total = total_of(weights)
    return [weight / total for weight in weights]


def direction_weights(problem: Problem) -> Tensor:
    """Return for each direction the weight of the clients that train it.

    Float64, as many as the largest rank that anyone trains or receives.
    """
    weights = [part.weight for part in problem.partitions for _ in range(part.begin, part.end)]
    return torch.tensor(weights, dtype=torch.float64)
