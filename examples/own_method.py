"""A method of your own: the mean of products, where clients above a size count no more.

    fedllm plan examples/own_method.yaml     # imports the class, checks its options and ranks
    fedllm run examples/own_method.yaml

`SpectralMethod` carries U, S and V^T for each module and hands every client a slice of its rank.
The class below says what clients weigh, how a block of updates is summed, and what the sums become.
docs/own-method.md explains each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedllm.aggregation import routes
from fedllm.config.models import Section
from fedllm.methods.spectral.spectral_state import SpectralMethod


class CappedOptions(Section):
    """`most_rows`: a client with more rows counts as if it had so many."""

    most_rows: int = 100


@dataclass(frozen=True, kw_only=True)
class CappedMean(SpectralMethod):
    """The SVD of the mean of the clients' changes, weighted by rows up to a cap."""

    name: ClassVar[str] = "capped_mean"
    options_class: ClassVar[type[CappedOptions]] = CappedOptions
    options: CappedOptions = field(default_factory=CappedOptions)

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return a weight for each client of the round."""
        return [float(min(n, self.options.most_rows)) for n in rows]

    def fold(self, block: Any, step: Any) -> Any:
        """Return the sum over a block of clients: weight x scale x B A."""
        return routes.fold(block, step.problem)

    def finish(self, partials: Any, step: Any) -> Any:
        """Return the new state from the sums of all blocks."""
        return self.decomposed(
            partials,
            step,
            divisor=step.total,
            # what directions that nobody trained are multiplied by
            untrained=lambda part: part.weight / step.total,
        )
