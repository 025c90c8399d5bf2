"""Factors agree with PEFT's own arithmetic."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedllm.config.scales import scale_of
from fedllm.lora.factors import Factors, delta
from fedllm.methods.spectral.flexlora import FlexLora
from tests.methods.aggregating import aggregate


class Tiny(nn.Module):
    """Two linear layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 9, bias=False)
        self.up_proj = nn.Linear(9, 15, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(self.q_proj(x))


CONFIGS = {
    "plain": LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "up_proj"]),
    "rslora": LoraConfig(r=5, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=4,
        rank_pattern={"up_proj": 6},
        alpha_pattern={"up_proj": 7},
        target_modules=["q_proj", "up_proj"],
    ),
}


@pytest.fixture(scope="module")
def adapted() -> PeftModel:
    """One base with three adapters of different ranks, alphas and scalings, all trained."""
    torch.manual_seed(0)
    names = list(CONFIGS)
    model = get_peft_model(Tiny(), CONFIGS[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    return model


def factors_of(model: PeftModel, module: str, adapter: str) -> Factors:
    layer: Any = model.get_submodule(f"base_model.model.{module}")
    config: Any = CONFIGS[adapter]
    rank = config.rank_pattern.get(module, config.r)
    alpha = config.alpha_pattern.get(module, config.lora_alpha)
    scaling = "rslora" if config.use_rslora else "fixed"
    return Factors(
        a_RI=layer.lora_A[adapter].weight.detach(),
        b_OR=layer.lora_B[adapter].weight.detach(),
        scale=scale_of(alpha=alpha, scaling=scaling, rank=rank),
    )


@pytest.mark.parametrize("adapter", CONFIGS)
@pytest.mark.parametrize("module", ["q_proj", "up_proj"])
def test_delta_is_pefts_delta_weight(adapted: PeftModel, module: str, adapter: str) -> None:
    layer: Any = adapted.get_submodule(f"base_model.model.{module}")
    ours = delta(factors_of(adapted, module, adapter))
    torch.testing.assert_close(ours.float(), layer.get_delta_weight(adapter).detach())


@pytest.mark.parametrize("module", ["q_proj", "up_proj"])
def test_mixed_ranks_alphas_and_scalings_average_as_pefts_deltas(
    adapted: PeftModel, module: str
) -> None:
    weights = [0.5, 0.2, 0.3]
    layer: Any = adapted.get_submodule(f"base_model.model.{module}")
    mean = sum(
        p * layer.get_delta_weight(name).detach().double()
        for p, name in zip(weights, CONFIGS, strict=True)
    )
    method = FlexLora(seed=0, alpha=16.0, scaling="rslora")
    updates = [factors_of(adapted, module, name) for name in CONFIGS]
    state = aggregate(method, updates, weights, [4, 9]).state
    full = method.module_adapter(module="m", state=state, rank=9)
    assert full.scale == 16.0 / 3
    torch.testing.assert_close(delta(full), mean, rtol=1e-5, atol=1e-5)
