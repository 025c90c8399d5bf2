"""A bfloat16 base, or bfloat16 training, learns what float32 learns.

A small adapter changes an output by less than the last place of a bfloat16 number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
)

from fedllm.config.models import EvaluationSection, TrainingSection
from fedllm.evaluation.reading import answer_losses, padded_losses
from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import Base
from fedllm.model.targets import find_modules
from fedllm.packing.micro_batches import PACKERS, Cut
from fedllm.packing.precision import precision
from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings, TrainResult, train_client
from fedllm.training.step_plan import Draws
from fedllm.training.together import Together
from fedllm.training.trainer_protocol import Member

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SIZES = {"vocab_size": 258, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
OTHERS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=258,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "mixtral": MixtralConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4
    ),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYOUTS = ("parts", "mask", "packed", "padded")


@dataclass(frozen=True)
class Row:
    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: tuple[int, ...] = ()


def rows_of(client: int) -> list[Row]:
    draws = torch.Generator().manual_seed(client)
    ids = torch.randint(2, 258, (4, 20), generator=draws).tolist()
    common = ids[0][:9]
    return [Row([*common, *own[:3]], own[3:15]) for own in ids]


def model_of(config: PretrainedConfig, dtype: str) -> nn.Module:
    """Return a model whose weights have the same values in both formats."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.0 / parameter.shape[-1] ** 0.5)
    return model.bfloat16().to(getattr(torch, dtype)).eval()


def slots_of(dtype: str, layout: str = "parts") -> AdapterSlots:
    model = model_of(LLAMA, dtype)
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    base = Base(
        model=model, tokenizer=tokenizer, fingerprint="", modules=find_modules(model, TARGETS)
    )
    return AdapterSlots(base, target_modules=TARGETS, layout=layout)


def start(slots: AdapterSlots, b: float = 0.0) -> Adapter:
    draws = torch.Generator().manual_seed(1)
    return {
        name: Factors(
            a_RI=torch.randn(4, m.in_features, generator=draws) / m.in_features**0.5,
            b_OR=torch.randn(m.out_features, 4, generator=draws) * b,
            scale=2.0,
        )
        for name, m in slots.base.modules.items()
    }


def settings(precision_: str, **changes: object) -> LocalSettings:
    section = {
        "batch_size": 4,
        "epochs": 8,
        "learning_rate": 3e-5,  # where a sum that is rounded at once loses most of it
        "schedule": "constant",
        "precision": precision_,
        **changes,
    }
    return LocalSettings(
        training=TrainingSection.model_validate(section), rule=LOCAL_RULES["fedit"]
    )


def draws_of(client: int) -> Draws:
    return Draws(seed=0, round=1, client=str(client))


def trained(dtype: str, precision_: str, layout: str = "parts", **changes: object) -> TrainResult:
    slots = slots_of(dtype, layout)
    chosen = settings(precision_, **changes)
    return train_client(slots, start(slots), rows_of(0), settings=chosen, draws=draws_of(0))


def assert_learns_as(found: list[float], exact: list[float]) -> None:
    """Return the loss after eight steps, and how much it fell since the first."""
    assert len(found) == 8
    assert found[-1] == pytest.approx(exact[-1], rel=0.02)
    assert found[0] - found[-1] == pytest.approx(exact[0] - exact[-1], rel=0.25)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_learns_in_eight_steps_what_float32_learns(dtype: str, layout: str) -> None:
    exact = trained("float32", "float32", layout).stats.losses
    found = trained(dtype, "bfloat16", layout).stats.losses
    assert found != exact
    assert_learns_as(found, exact)


def test_clients_that_train_together_learn_in_bfloat16_as_in_float32() -> None:
    losses = {}
    for dtype, name in (("float32", "float32"), ("bfloat16", "bfloat16")):
        slots = slots_of(dtype)
        members = [
            Member(received=partial(start, slots), rows=rows_of(client), draws=draws_of(client))
            for client in (0, 1)
        ]
        results = Together(slots=slots, settings=settings(name)).train(members)
        losses[name] = [result.stats.losses for result in results]
    for found, exact in zip(losses["bfloat16"], losses["float32"], strict=True):
        assert_learns_as(found, exact)


def test_a_bfloat16_base_trained_in_float32_is_the_float32_base() -> None:
    exact, found = trained("float32", "float32"), trained("bfloat16", "float32")
    assert found.stats.losses == pytest.approx(exact.stats.losses, abs=1e-5)


def test_no_wide_copy_of_a_bfloat16_base_is_kept() -> None:
    slots = slots_of("bfloat16")
    slots.install(start(slots))
    layers: list[Any] = [m for m in slots.model.modules() if hasattr(m, "base_layer")]
    weights = {tuple(layer.weight.shape) for layer in layers}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(slots, "float32", rows_of(0)).backward()
    wide = [t for t in kept if t.dtype == torch.float32 and t.ndim == 2]
    assert not [t for t in wide if tuple(t.shape) in weights or tuple(t.t().shape) in weights]
    base = [p for name, p in slots.model.named_parameters() if "lora" not in name]
    assert {p.dtype for p in base if p.ndim > 1} == {torch.bfloat16}


def loss_of(slots: AdapterSlots, name: str, rows: list[Row]) -> Tensor:
    cut = Cut(loss_on="answer", pad_token=0, device="cpu")
    (one,) = PACKERS[slots.layout](rows, cut)
    with precision(name, CPU):
        return one.loss_sum(slots.model)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_change_below_the_last_place_arrives_behind_attention(name: str, layout: str) -> None:
    """Values too keep it: they are sums that attention uses unrounded."""

    def heard(dtype: str, name: str, b: float) -> Tensor:
        slots = slots_of(dtype, layout)
        adapter = start(slots, b)
        slots.install({m: f for m, f in adapter.items() if m.endswith("layers.0.self_attn.v_proj")})
        caught: list[Tensor] = []
        layer = slots.model.get_submodule("model.layers.0.self_attn.o_proj")
        layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        with torch.no_grad():
            loss_of(slots, name, rows_of(0)[:1])
        return caught[0]

    exact = heard("float32", "float32", 1e-4) - heard("float32", "float32", 0.0)
    found = heard("bfloat16", name, 1e-4) - heard("bfloat16", name, 0.0)
    assert exact.norm() > 0
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_repeats_a_pass_in_its_own_precision(dtype: str) -> None:
    whole = trained(dtype, "bfloat16")
    again = trained(dtype, "bfloat16", gradient_checkpointing=True)
    assert again.stats.losses == pytest.approx(whole.stats.losses, abs=1e-6)


@pytest.fixture(params=sorted(OTHERS))
def other(request: pytest.FixtureRequest) -> Iterator[PretrainedConfig]:
    yield OTHERS[request.param]


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_classes_with_layers_of_other_kinds_compute_in_either_precision(
    other: PretrainedConfig, name: str
) -> None:
    tokens = torch.arange(20).reshape(2, 10) + 5
    exact = model_of(other, "float32")(input_ids=tokens).logits
    model: Any = model_of(other, "bfloat16")
    base = Base(model=model, tokenizer=None, fingerprint="", modules={})
    AdapterSlots(base, target_modules=[])
    with precision(name, CPU), torch.inference_mode():
        found = model(input_ids=tokens).logits.float()
        answers = model.generate(input_ids=tokens, max_new_tokens=2, do_sample=False)
    # fused experts compute in bfloat16 whatever the precision
    tolerance = 0.03 if name == "bfloat16" or isinstance(other, MixtralConfig) else 1e-5
    assert (found - exact).norm() < tolerance * exact.norm()
    assert answers.shape[1] == 12


def test_answers_are_scored_in_the_precision_of_training() -> None:
    """Packed and padded losses both agree with training."""
    section = EvaluationSection(max_new_tokens=2)
    losses = {}
    for name in ("float32", "bfloat16"):
        slots = slots_of("bfloat16")
        slots.install(start(slots, 1e-4))
        with precision(name, CPU):
            read = answer_losses(slots, [rows_of(0)], layout="parts", batch_size=section.batch_size)
            padded = padded_losses(slots, rows_of(0), section.batch_size)
        assert sum(read) == pytest.approx(loss_of(slots, name, rows_of(0)).item(), rel=1e-3)
        assert padded == pytest.approx(read, rel=0.01)
        losses[name] = read
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
