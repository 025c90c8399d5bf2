"""Slots compute one client's adapter at a time as PEFT does, and keep nothing of the last one."""

import resource
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedllm.errors import AdapterError
from fedllm.lora.factors import Adapter, Factors
from fedllm.model.base import Base, load_base
from fedllm.packing.slots import AdapterSlots
from tests.tiny import Tiny

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
TOKENS = torch.arange(20).reshape(2, 10) + 5


@pytest.fixture
def base(tiny: Tiny) -> Base:
    return load_base(tiny.model, dtype="float32", device="cpu")


@pytest.fixture
def slots(base: Base) -> AdapterSlots:
    return AdapterSlots(base, target_modules=TARGETS)


def sides(base: Base) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in base.model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    }


def num_slots(slots: AdapterSlots) -> int:
    """Return how many adapters PEFT holds beside any layer."""
    layers = [module for module in slots.model.modules() if isinstance(module, LoraLayer)]
    return max((len(layer.lora_A) for layer in layers), default=0)


def adapter(
    shapes: Mapping[str, tuple[int, int]], *, seed: int, rank: int = 3, scale: float = 1.7
) -> Adapter:
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for module, (out, in_) in shapes.items():
        own = rank + 2 if "up_proj" in module else rank
        found[module] = Factors(
            a_RI=torch.randn(own, in_, generator=draws),
            b_OR=torch.randn(out, own, generator=draws),
            scale=scale,
        )
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def fresh_peft(tiny: Tiny, wanted: Adapter) -> PeftModel:
    """Return a separate PEFT model, made without slots."""
    config = LoraConfig(
        target_modules=list(TARGETS),
        rank_pattern={module: factors.rank for module, factors in wanted.items()},
        alpha_pattern={module: f.scale * f.rank for module, f in wanted.items()},
    )
    model: Any = get_peft_model(load_base(tiny.model, dtype="float32", device="cpu").model, config)
    for module, factors in wanted.items():
        layer = model.base_model.model.get_submodule(module)
        layer.lora_A["default"].weight.data.copy_(factors.a_RI)
        layer.lora_B["default"].weight.data.copy_(factors.b_OR)
    return model


def test_an_installed_adapter_computes_what_a_fresh_peft_model_does(
    tiny: Tiny, slots: AdapterSlots
) -> None:
    shapes = sides(slots.base)
    first = adapter(shapes, seed=1)
    others = [adapter(shapes, seed=2, rank=7), adapter(shapes, seed=3, scale=0.3), first]
    for wanted in others:
        slots.install(wanted)
        torch.testing.assert_close(logits(slots.model), logits(fresh_peft(tiny, wanted)))
    assert num_slots(slots) == 2


def test_200_swaps_leave_base_and_memory_as_they_were(slots: AdapterSlots) -> None:
    shapes = sides(slots.base)
    adapters = [adapter(shapes, seed=seed, rank=2 + seed % 2) for seed in range(4)]
    before = {name: value.clone() for name, value in slots.model.state_dict().items()}
    expected = []
    for wanted in adapters:
        slots.install(wanted)
        expected.append(logits(slots.model))
    modules = len(list(slots.model.modules()))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for turn in range(200):
        slots.install(adapters[turn % 4])
    assert num_slots(slots) == 2
    assert len(list(slots.model.modules())) == modules
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 4096
    slots.install(adapters[2])
    assert torch.equal(logits(slots.model), expected[2])
    after = slots.model.state_dict()
    for name, value in before.items():
        same = name if name in after else ".base_layer.".join(name.rsplit(".", 1))
        assert torch.equal(value, after[same])


def test_only_the_installed_adapter_trains(slots: AdapterSlots) -> None:
    shapes = sides(slots.base)
    slots.install(adapter(shapes, seed=0))
    installed = slots.install(adapter(shapes, seed=1, rank=5))
    training = {id(p) for p in slots.model.parameters() if p.requires_grad}
    assert training == {id(p) for p in installed.parameters}
    assert len(installed.parameters) == 2 * len(shapes)


def test_gradients_of_the_last_client_are_gone(slots: AdapterSlots) -> None:
    wanted = adapter(sides(slots.base), seed=0)
    installed = slots.install(wanted)
    slots.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in installed.parameters)
    assert all(p.grad is None for p in slots.install(wanted).parameters)


def test_factors_are_copies_of_what_was_trained(slots: AdapterSlots) -> None:
    shapes = sides(slots.base)
    wanted = adapter(shapes, seed=0, scale=0.25)
    installed = slots.install(wanted)
    taken = installed.factors()
    slots.install(adapter(shapes, seed=1))
    for module, factors in wanted.items():
        assert torch.equal(taken[module].a_RI, factors.a_RI)
        assert torch.equal(taken[module].b_OR, factors.b_OR)
        assert taken[module].scale == factors.scale


def test_an_adapter_of_fewer_modules_leaves_the_others_at_the_base(
    tiny: Tiny, slots: AdapterSlots
) -> None:
    shapes = sides(slots.base)
    slots.install(adapter(shapes, seed=0))
    part = {module: f for module, f in adapter(shapes, seed=1).items() if "up_proj" in module}
    slots.install(part)
    whole = fresh_peft(tiny, adapter(shapes, seed=1))
    for module in shapes:
        if module not in part:
            layer: Any = whole.get_submodule(f"base_model.model.{module}")
            layer.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(logits(slots.model), logits(whole))


def test_adapters_stay_float32_on_a_bfloat16_base(tiny: Tiny) -> None:
    base = load_base(tiny.model, dtype="bfloat16", device="cpu")
    slots = AdapterSlots(base, target_modules=TARGETS)
    wanted = adapter(sides(base), seed=0)
    installed = slots.install(wanted)
    assert {p.dtype for p in installed.parameters} == {torch.float32}
    assert all(torch.equal(f.a_RI, wanted[m].a_RI) for m, f in installed.factors().items())
    assert torch.isfinite(logits(slots.model)).all()


def test_installing_draws_nothing_from_the_global_generator(slots: AdapterSlots) -> None:
    state = torch.random.get_rng_state()
    slots.install(adapter(sides(slots.base), seed=0))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("checkpointing", [False, True, None], ids=["off", "on", "off again"])
def test_nothing_below_the_first_adapter_is_differentiated(
    slots: AdapterSlots, checkpointing: bool | None
) -> None:
    upper = {m: f for m, f in adapter(sides(slots.base), seed=0).items() if ".layers.1." in m}
    installed = slots.install(upper)
    if checkpointing is None:
        slots.train(recompute=True)
    slots.train(recompute=bool(checkpointing))
    entering: dict[str, bool] = {}
    for name in ("model.layers.0", "model.layers.1", "model.layers.1.mlp"):
        slots.model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: entering.__setitem__(name, inputs[0].requires_grad)
        )
    slots.model(input_ids=TOKENS, use_cache=False).logits.sum().backward()
    assert entering == {
        "model.layers.0": False,
        "model.layers.1": False,
        "model.layers.1.mlp": True,
    }
    assert all(p.grad is not None for p in installed.parameters)
    own = {id(p) for p in installed.parameters}
    assert all(p.grad is None for p in slots.model.parameters() if id(p) not in own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "nothing to install"),
        (lambda a: {"model.layers.9.q_proj": next(iter(a.values()))}, r"layers.9.q_proj: not a"),
        (
            lambda a: {
                m: Factors(a_RI=f.a_RI[:, :-1], b_OR=f.b_OR, scale=1.0) for m, f in a.items()
            },
            "another model",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    slots: AdapterSlots, change: object, message: str
) -> None:
    assert callable(change)
    with pytest.raises(AdapterError, match=message):
        slots.install(change(adapter(sides(slots.base), seed=0)))
    assert num_slots(slots) == 0
