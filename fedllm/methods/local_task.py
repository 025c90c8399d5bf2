"""What a method asks of its clients' training: data, the same for all engines. Nothing loads torch.

A client's adapter is the product of A and B. A column of it that is not to train is handed out as a
frozen part (`Factors.frozen`); whole factors are frozen here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

TrainedFactors: TypeAlias = Literal["AB", "A", "B", "C"]  # C: an r x r core between B and A


@dataclass(frozen=True, kw_only=True)
class LocalTask:
    """The task of a round: `trained` are the factors that train, the other stays as received.

    Where the core C trains, the change is s B C A with the B and A that were received, and C begins
    as the identity; the client sends B C in the place of B.

    With a `tail_penalty` lambda, lambda |B[:, k:]| |A[k:]| is added to the loss of every step and
    module, k = `leading` of the client's rank: HetLoRA's regulariser of the last directions.

    With an `entries_seed` the values of A and B are no factors: they belong to as many entries of
    the weight, drawn from that seed (`lora.entries`), and both train, without scale and dropout.
    """

    trained: TrainedFactors = "AB"
    entries_seed: int | None = None
    tail_penalty: float = 0.0
    tail_share: float = 1.0

    def leading(self, rank: int) -> int:
        """Return how many of `rank` directions are before the tail: at least one."""
        return max(1, math.floor(self.tail_share * rank))


@dataclass(frozen=True, kw_only=True)
class Recipient:
    """The client that receives an adapter, and the round that it trains in.

    `kept` is what the client itself kept of the module from its last round, by name; `notes` is
    what it kept beside, as JSON holds it.
    """

    client: str
    round: int
    kept: "Mapping[str, Tensor]" = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
