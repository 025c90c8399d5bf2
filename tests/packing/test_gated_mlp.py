"""Gated MLPs and adapters that save less for the gradient give the same bits."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
)

from fedllm.lora.factors import Factors
from fedllm.model.base import Base
from fedllm.packing.gated_mlp import LARGE, save_mlp_memory
from fedllm.packing.row_dropout import Piece
from fedllm.packing.slots import AdapterSlots

# two rows of so many tokens are as wide as pays
WIDE, LONG = 1024, 128
assert 2 * LONG * WIDE >= LARGE
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": WIDE,
}
GATED = {
    "llama": LlamaConfig(**SIZES),
    "qwen": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
}
OTHERS = {
    "phi": Phi3Config(**SIZES, pad_token_id=0),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
}


def model_of(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def slots_of(config: Any, dropout: float) -> AdapterSlots:
    base = Base(model=model_of(config), tokenizer=None, fingerprint="", modules={})
    return AdapterSlots(base, target_modules="all-linear", dropout=dropout)


def adapter_for(slots: AdapterSlots) -> dict[str, Factors]:
    draws = torch.Generator().manual_seed(1)
    return {
        name: Factors(
            a_RI=torch.randn(3, module.in_features, generator=draws),
            b_OR=torch.randn(module.out_features, 3, generator=draws) / 10,
            scale=0.5,
        )
        for name, module in slots._modules.items()
    }


@contextmanager
def saved_tensors() -> Iterator[dict[int, Tensor]]:
    """Collect the tensors that are saved for the gradient, by their addresses."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def loss_of(slots: AdapterSlots) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the loss of one pass with the installed adapter, and the saved tensors."""
    slots.train()
    tokens = torch.arange(2 * LONG).view(2, LONG) % SIZES["vocab_size"]
    slots.rows.enter([Piece(entry=n, start=0, stop=LONG, seed=n) for n in range(2)])
    model: Any = slots.model
    with saved_tensors() as saved:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss, saved


def gradients(slots: AdapterSlots) -> tuple[list[Tensor], list[Tensor]]:
    """Return the loss and all gradients of one pass, and the wide saved tensors."""
    installed = slots.install(adapter_for(slots))
    loss, saved = loss_of(slots)
    loss.backward()
    wide = [x for x in saved.values() if x.is_floating_point() and x.shape == (2, LONG, WIDE)]
    return [loss.detach(), *(p.grad for p in installed.parameters if p.grad is not None)], wide


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", GATED)
def test_a_gated_mlp_saves_two_tensors_of_its_width_and_gives_the_same_bits(
    family: str, dropout: float
) -> None:
    found, wide = gradients(slots_of(GATED[family], dropout))
    plain = slots_of(GATED[family], dropout)
    for module in plain.model.modules():
        if hasattr(module, "gate_proj"):
            # back to what transformers computes
            del module.forward
    expected, all_wide = gradients(plain)
    assert len(found) == len(expected) > 1
    assert all(map(torch.equal, found, expected))
    assert len(wide) == 2 * SIZES["num_hidden_layers"] < len(all_wide)


@pytest.mark.parametrize("family", OTHERS)
def test_another_mlp_stays_as_it_is(family: str) -> None:
    model = model_of(OTHERS[family])
    save_mlp_memory(model)
    assert not any("forward" in vars(module) for module in model.modules())


class Shifted(nn.Module):
    """An MLP with the names of a gated MLP and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj, self.act_fn = nn.Linear(6, 4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1.0))
        return product


def test_names_alone_do_not_make_a_gated_mlp() -> None:
    mlp = Shifted()
    save_mlp_memory(nn.ModuleList([mlp]))
    assert "forward" not in vars(mlp)


def test_no_saved_tensor_outlives_the_backward_pass() -> None:
    slots = slots_of(GATED["llama"], 0.2)
    slots.install(adapter_for(slots))
    loss, saved = loss_of(slots)
    wide = [weakref.ref(x) for x in saved.values() if x.shape == (2, LONG, WIDE)]
    saved.clear()
    assert any(ref() is not None for ref in wide)
    loss.backward()
    # the loss is still here, and with it the graph, whose nodes may keep no tensor
    assert all(ref() is None for ref in wide)
