"""FFA-LoRA: A is frozen, clients train B alone.

Sun et al., ICLR 2024, https://arxiv.org/abs/2403.12313: all clients keep the A of round 0, and
B = sum_i p_i B_i. Since A is the same for all, the product of the means is the mean of the
products: nothing is lost in aggregation.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedllm.methods.local_task import LocalTask
from fedllm.methods.pairs.factor_mean import FactorMean


@dataclass(frozen=True, kw_only=True)
class Ffa(FactorMean):
    """The mean of every client's B; A stays as it was drawn."""

    name: ClassVar[str] = "ffa"

    def local_task(self, round_number: int) -> LocalTask:
        """Return B, in every round."""
        del round_number
        return LocalTask(trained="B")
