"""RoLoRA: clients train A and B in turn, one factor a round.

Chen et al., https://arxiv.org/abs/2409.02346: in odd rounds A is frozen and B = sum_i p_i B_i, in
even rounds B is frozen and A = sum_i p_i A_i. One factor is the same for all clients, so that the
product of the means is the mean of the products. B is zero at first: it is the one to begin with.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedllm.methods.local_task import LocalTask
from fedllm.methods.pairs.factor_mean import FactorMean


@dataclass(frozen=True, kw_only=True)
class RoLora(FactorMean):
    """The mean of the factor that clients trained; the other one is the same for all."""

    name: ClassVar[str] = "rolora"

    def local_task(self, round_number: int) -> LocalTask:
        """Return B in odd rounds, A in even ones."""
        return LocalTask(trained="B" if round_number % 2 else "A")
