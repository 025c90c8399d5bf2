"""FlexLoRA: weighted mean of full-size products, SVD, every client its own rank.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, https://arxiv.org/abs/2402.11505: dW = sum_i (n_i / n) s_i B_i A_i,
U S V^T = SVD(dW), and a client of rank r receives A = V_r^T, B = U_r diag(S_r) / s_r.

With `truncated: keep` directions that a client did not receive count as unchanged instead of zero:
dW' = dW + sum_i p_i (W - W_{r_i}), W the state before the round and W_r its truncation. The second
sum is U diag(S_j (1 - P_j)) V^T, P_j the share of the weight of the clients with r_i >= j. Clients
send and receive the same bytes. This form is ours: the paper's multiplies direction j by P_j in a
round in which nobody trains.

With private clients n_i is what the clipped change of client i counts, n the cohort's size, and
the sum gets noise: W' = W + (sum_i n_i (s_i B_i A_i - W_{r_i}) + noise) / n.

With `frozen_tail` beside it a client also receives W - W_{r_i}, as frozen columns without dropout:
it trains against the whole model. It receives (R - r_i) (O + I) numbers a module more, R the
largest rank, and sends no more; its optimizer keeps nothing for them. The aggregation is the same,
and so are scores as deployed: those of the client's own rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

from fedllm.aggregation import routes
from fedllm.aggregation.route_types import Partial, RankPartition
from fedllm.lora.factors import FactorBlock, Factors
from fedllm.methods.local_task import Recipient
from fedllm.methods.options import FlexLoraOptions
from fedllm.methods.privacy import noise
from fedllm.methods.protocol import ModuleAggregate, ModuleState, ServerStep
from fedllm.methods.spectral.spectral_state import SpectralMethod, with_room, with_state
from fedllm.methods.weights import direction_weights


@dataclass(frozen=True, kw_only=True)
class FlexLora(SpectralMethod):
    """The mean of products, of which every client receives the best approximation of its rank."""

    name: ClassVar[str] = "flexlora"
    options_class: ClassVar[type[FlexLoraOptions]] = FlexLoraOptions

    options: FlexLoraOptions = field(default_factory=FlexLoraOptions)

    def hand_out(self, *, module: str, state: ModuleState, rank: int, to: Recipient) -> Factors:
        """Return the best approximation of `rank`, with `frozen_tail` beside the rest of W."""
        own = super().hand_out(module=module, state=state, rank=rank, to=to)
        if not (self.options.frozen_tail and bool(state["S"][rank:].any())):
            return own
        b_OR = state["U"][:, rank:] * state["S"][rank:]
        return replace(own, frozen=Factors(a_RI=state["Vh"][rank:], b_OR=b_OR, scale=1.0))

    def fold(self, block: FactorBlock, step: ServerStep) -> Partial:
        """Return the block's weighted sum of products, as the problem's route holds it."""
        return routes.fold(block, self._roomy(step).problem)

    def finish(self, partials: Iterable[Partial], step: ServerStep) -> list[ModuleAggregate]:
        """Return the leading triplets of the weighted sums of products, all able to train."""
        # an update is the client's whole adapter: the state it began from is within
        if self._keeps:
            # sum_i n_i (W - W_{r_i}) = U diag(S_j (n - N_j)) V^T
            missed_R = step.total - direction_weights(step.problem)[: step.problem.rank]
            step = self._roomy(step)
            partials = with_state(partials, step, missed_R)
        if step.noise_std:
            shape = (step.problem.out, step.problem.in_)
            added = {"W": noise(step, "W", shape, seed=self.seed)}
            partials = chain(partials, [added])

        def untrained(part: RankPartition) -> float:
            return 1.0 if self._keeps else part.weight / step.total

        return self.decomposed(partials, step, divisor=step.total, untrained=untrained)

    @property
    def _keeps(self) -> bool:
        return self.options.truncated == "keep"

    def _roomy(self, step: ServerStep) -> ServerStep:
        return with_room(step) if self._keeps else step
