"""The base with a LoRA adapter, and the server of FlexLoRA as a peer's user would write it.

O out, I in, R rank.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from benchmarks.rounds import ALPHA, RANK, TARGETS

Tensors = Mapping[str, torch.Tensor]
A, B = ".lora_A.", ".lora_B."


def load_model(path: str) -> Any:
    """Return the base in float32 with an adapter that has the same A in every process and B = 0."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS))
    )
    return model.train()


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's factors."""
    return {name: t.detach().clone() for name, t in get_peft_model_state_dict(model).items()}


def flexlora(updates: Iterable[tuple[float, Tensors]]) -> dict[str, torch.Tensor]:
    """Return the best adapter of rank R of the weighted mean of dense products B A.

    Weights sum to 1. A full SVD per module; B gets all singular values (FlexLoRA, section 3.2).
    """
    means: dict[str, torch.Tensor] = {}
    for weight, update in updates:
        for name, a_RI in update.items():
            if A in name:
                product_OI = weight * (update[name.replace(A, B)] @ a_RI)
                means[name] = means[name] + product_OI if name in means else product_OI
    factors: dict[str, torch.Tensor] = {}
    for name, mean_OI in means.items():
        u_OO, s, vh_II = torch.linalg.svd(mean_OI, full_matrices=False)
        factors[name] = vh_II[:RANK].contiguous()
        factors[name.replace(A, B)] = u_OO[:, :RANK] * s[:RANK]
    return factors
