"""Factor mean: A and B averaged separately, at one rank for all.

What FedAvg (McMahan et al., https://arxiv.org/abs/1602.05629) and FedIT (Zhang et al.,
https://arxiv.org/abs/2305.05644) do with LoRA adapters. The product of the means is not the mean
of the products: the baseline that FlexLoRA is compared with.

Legend: O out, I in, R rank of the state and of every client.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.aggregation.routes import truncated_svd
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, ModuleShape, initial_a, scale_of, stack
from fedllm.methods.diagnostics import diagnose
from fedllm.methods.protocol import Method, ModuleAggregate, ModuleState, ModuleUpdates
from fedllm.methods.state import carried
from fedllm.methods.weights import shares


@dataclass(frozen=True, kw_only=True)
class FactorMean(Method):
    """The state is a factor pair, `A` (R, I) and `B` (O, R), at the scale of a client."""

    kind: ClassVar[str] = "lora"
    name: ClassVar[str] = "factor_mean"

    seed: int
    alpha: float
    scaling: str = "fixed"

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        return {"A": (rank, shape.in_), "B": (shape.out, rank)}

    def refuse(self, tier_ranks: Sequence[Mapping[str, int]]) -> str | None:
        """Return a reason where two tiers' ranks differ: means need factors of one shape."""
        for name in sorted({name for ranks in tier_ranks for name in ranks}):
            found = sorted({ranks[name] for ranks in tier_ranks if name in ranks})
            if len(found) > 1:
                return (
                    f"method.name: factor_mean averages factors of one rank, but clients.tiers "
                    f"gives {name} the ranks {', '.join(map(str, found))}: "
                    f"set all to {found[0]}, or use flexlora"
                )
        return None

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return no change yet: the seeded A, and B zero."""
        a_RI = initial_a(seed=self.seed, module=module, rank=rank, shape=shape)
        return {"A": a_RI, "B": torch.zeros(shape.out, rank)}

    def module_adapter(self, *, module: str, state: ModuleState, rank: int) -> Factors:
        """Return the state itself: the one rank it has."""
        held = state["A"].shape[0]
        if rank != held:
            raise AdapterError(
                f"{module}: rank {rank} asked of a factor mean of rank {held}: ask for {held}"
            )
        return Factors(a_RI=state["A"], b_OR=state["B"], scale=self._scale(rank))

    def weigh(self, rows: Sequence[float]) -> list[float]:
        """Return n_i / n."""
        return shares(rows)

    def aggregate_module(
        self,
        *,
        module: str,
        state: ModuleState,
        updates: ModuleUpdates,
        weights: Sequence[float],
        ranks: Sequence[int],
    ) -> ModuleAggregate:
        """Return sum_i p_i A_i and sum_i p_i B_i; the diagnostics are those of their product.

        A client whose scale is not the state's has the difference folded into its B.
        """
        del state  # an update is the client's whole adapter
        read = list(updates)
        shapes = sorted({(item.shape.out, item.shape.in_, item.rank) for item in read})
        if len(shapes) != 1 or {shapes[0][2]} != set(ranks):
            raise AdapterError(
                f"{module}: factor_mean needs adapters of one shape and rank, got (out, in, rank) "
                f"{shapes} for rank {sorted(set(ranks))}: use flexlora"
            )
        rank = shapes[0][2]
        scale = self._scale(rank)
        weighted = list(zip(read, weights, strict=True))
        a_RI = _weighted_sum([item.a_RI for item in read], weights)
        b_OR = _weighted_sum(
            [item.b_OR for item in read], [p * (item.scale / scale) for item, p in weighted]
        )
        stacked = stack([Factors(a_RI=a_RI, b_OR=b_OR, scale=scale)], [1.0])
        return ModuleAggregate(
            state=carried(module, {"A": a_RI, "B": b_OR}),
            diagnostics=diagnose(truncated_svd(stacked, rank=rank), ranks=ranks, stacked_rank=rank),
        )

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return None: the base stays as it is."""
        del state
        return None

    def _scale(self, rank: int) -> float:
        return scale_of(alpha=self.alpha, scaling=self.scaling, rank=rank)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum in float64, added up in the order given."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total
