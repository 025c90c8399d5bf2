"""A method whose state includes a change of the base."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.methods.protocol import ModuleState
from fedllm.methods.spectral.flexlora import FlexLora


@dataclass(frozen=True, kw_only=True)
class Shifting(FlexLora):
    """FlexLoRA whose state makes every base weight 0.01 larger."""

    def base_delta(self, state: ModuleState) -> Tensor | None:
        return torch.full((state["U"].shape[0], state["Vh"].shape[1]), 0.01)
