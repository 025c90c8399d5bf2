"""Layers that recompute give the bits of layers that save; a budget decides how many do."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fedllm.lora.factors import Factors
from fedllm.model.base import Base
from fedllm.packing.recompute import Recomputation, Recompute
from fedllm.packing.row_dropout import Piece
from fedllm.packing.slots import AdapterSlots
from fedllm.storage.records import ModuleRecord

LAYERS = 6
WIDE = 512
SIZES: dict[str, Any] = {"vocab_size": 64, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, hidden_size=32, num_hidden_layers=LAYERS, intermediate_size=WIDE),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, n_inner=WIDE),
}
# a budget is never below the base's weights, so the passes are large beside them
TOKENS = torch.arange(2048).reshape(4, 512) % 64


class Passes:
    """Training passes of a small model, and the layers that recomputed."""

    def __init__(self, name: str, adapted: str = "") -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(CONFIGS[name])
        base = Base(model=model, tokenizer=None, fingerprint="", modules={})
        self.slots = AdapterSlots(base, target_modules="all-linear", dropout=0.1)
        adapter = {
            module: _factors(layer, seed)
            for seed, (module, layer) in enumerate(sorted(self.slots._modules.items()))
            if adapted in module
        }
        self.installed = self.slots.install(adapter)
        self.slots.train()
        self.model = model
        self.weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        layers = model.model.layers if name == "llama" else model.transformer.h
        self.counts = [0] * LAYERS
        for number, layer in enumerate(layers):
            mlp = layer.mlp.down_proj if name == "llama" else layer.mlp.c_proj
            mlp.register_forward_pre_hook(lambda _m, _i, n=number: self._count(n))

    def _count(self, number: int) -> None:
        self.counts[number] += 1

    def gradients(self) -> list[Tensor]:
        """Return the gradients of one pass."""
        self.counts[:] = [0] * LAYERS
        torch.manual_seed(0)  # of the model's own dropout
        rows = len(TOKENS)
        pieces = [Piece(entry=n, start=0, stop=TOKENS.shape[1], seed=n) for n in range(rows)]
        self.slots.rows.enter(pieces)
        self.model(input_ids=TOKENS, use_cache=False).logits.float().square().mean().backward()
        found = [p.grad.clone() for p in self.installed.parameters if p.grad is not None]
        for parameter in self.installed.parameters:
            parameter.grad = None
        return found

    @property
    def recomputed(self) -> list[int]:
        """Return the layers that ran twice in the last pass."""
        return [number for number, count in enumerate(self.counts) if count == 2]


def _factors(layer: ModuleRecord, seed: int) -> Factors:
    draws = torch.Generator().manual_seed(seed)
    out, in_ = layer.out_features, layer.in_features
    return Factors(
        a_RI=torch.randn(3, in_, generator=draws) / in_**0.5,
        b_OR=torch.randn(out, 3, generator=draws),
        scale=0.5,
    )


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_budget_decides_how_many_layers_recompute_and_no_bit_changes(name: str) -> None:
    passes = Passes(name)
    whole = passes.gradients()
    assert passes.recomputed == []
    counts = []
    for share in (1000, 500, 250, 125, 63, 32, 16, 0):
        recomputation = Recomputation(passes.model, cpu_budget=share * passes.weights)
        recomputation.set("auto")
        found = passes.gradients()
        assert all(map(torch.equal, found, whole))
        # the first is measured, the last are the first to be let go of in the backward pass
        assert passes.recomputed == list(range(1, 1 + len(passes.recomputed)))
        counts.append(len(passes.recomputed))
        recomputation.set(False)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == LAYERS - 1
    assert any(0 < count < LAYERS - 1 for count in counts)
    passes.gradients()
    assert passes.recomputed == []


@pytest.mark.parametrize("recompute", [True, "auto"])
def test_what_recomputes_may_change_at_any_time(recompute: Recompute) -> None:
    passes = Passes("llama")
    whole = passes.gradients()
    for now in (recompute, False, True, "auto", recompute):
        passes.slots.train(recompute=now)
        assert all(map(torch.equal, passes.gradients(), whole))
        assert passes.recomputed == (list(range(LAYERS)) if now is True else [])


def test_layers_below_the_first_adapter_are_not_measured() -> None:
    passes = Passes("llama", adapted="layers.3.")
    whole = passes.gradients()
    recomputation = Recomputation(passes.model, cpu_budget=0)
    recomputation.set("auto")
    assert all(map(torch.equal, passes.gradients(), whole))
    assert set(passes.recomputed) <= {4, 5}
    assert passes.recomputed


def test_an_evaluation_recomputes_nothing() -> None:
    passes = Passes("llama")
    recomputation = Recomputation(passes.model, cpu_budget=0)
    recomputation.set("auto")
    passes.slots.evaluate()
    passes.gradients()
    assert passes.recomputed == []
