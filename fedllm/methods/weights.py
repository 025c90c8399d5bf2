"""Clients' weights from what each one trained on."""

import math
from collections.abc import Sequence

from fedllm.errors import DataError


def shares(amounts: Sequence[float]) -> list[float]:
    """Return `amounts` over their sum: what FedAvg weighs clients by (arXiv 1602.05629).

    Raises:
        DataError: an amount is negative or not finite, or they sum to zero.
    """
    for place, amount in enumerate(amounts):
        if not (math.isfinite(amount) and amount >= 0):
            raise DataError(f"weight {place + 1} is {amount}: need a finite number >= 0")
    total = math.fsum(amounts)
    if total == 0:
        raise DataError(f"all {len(amounts)} weights are zero: at least one must be above")
    return [amount / total for amount in amounts]
