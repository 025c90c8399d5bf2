"""A change of the base is put on and taken off without a trace."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedllm.lora.factors import Factors
from fedllm.model.base import load_base
from fedllm.packing.base_change import BaseChange, ChangeableWeights
from fedllm.packing.slots import AdapterSlots
from tests.tiny import Tiny
from tests.training.test_loop import TARGETS, start

TOKENS = torch.arange(2, 12)[None]


def change_of(seed: int, shapes: dict[str, tuple[int, int]]) -> BaseChange:
    def of(module: str) -> Tensor | None:
        if "layers.1" in module:
            return None
        draws = torch.Generator().manual_seed(seed + len(module))
        return torch.randn(shapes[module], generator=draws) / 16

    return BaseChange(sha256=str(seed), of=of)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_change_is_in_the_weights_until_it_is_taken_off(tiny: Tiny, dtype: str) -> None:
    slots = AdapterSlots(load_base(tiny.model, dtype=dtype, device="cpu"), target_modules=TARGETS)
    slots.install(start(slots))
    shapes = {module: (f.shape.out, f.shape.in_) for module, f in start(slots).items()}
    before = weights(slots.model)
    slots.change_base(change_of(1, shapes))
    once = weights(slots.model)
    for module in shapes:
        name = f"{module}.base_layer.weight"
        added = change_of(1, shapes).of(module)
        assert added is None or isinstance(added, torch.Tensor)
        expected = before[name] if added is None else (before[name].float() + added)
        assert torch.equal(once[name], expected.to(before[name].dtype))
    slots.change_base(change_of(2, shapes))
    assert not same(weights(slots.model), once)
    slots.change_base(change_of(1, shapes))
    assert same(weights(slots.model), once)
    slots.change_base(None)
    assert same(weights(slots.model), before)


def test_a_weight_that_is_stored_transposed_is_changed_as_it_lies() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8))
    name = "transformer.h.0.mlp.c_fc"
    layer = model.get_submodule(name)
    assert isinstance(layer.weight, nn.Parameter)
    before = layer.weight.detach().clone()
    factors = Factors(a_RI=torch.randn(3, 8), b_OR=torch.randn(32, 3), scale=1.0)
    whole = factors.b_OR @ factors.a_RI
    changeable = ChangeableWeights(model, {name: True})
    for sha256, added in (("x", whole), ("y", factors)):
        changeable.put_on(BaseChange(sha256=sha256, of={name: added}.get))
        assert torch.equal(layer.weight, before + whole.T)
        changeable.put_on(None)
        assert torch.equal(layer.weight, before)
