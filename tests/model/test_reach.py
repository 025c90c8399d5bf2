"""Reach is measured, independent of what a configuration says."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from fedllm.model.reach import measure_reach

TEXT = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "kind",
    ["llama", "gemma2", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "mamba", "mixtral"],
)
def test_decoders_do_not_look_ahead(kind: str) -> None:
    found = measure_reach(AutoConfig.for_model(kind))
    assert (found.looks_ahead, found.unknown) == (0.0, "")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("roformer", {}),
        ("xlnet", {}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
    ],
)
def test_models_whose_tokens_see_later_ones_are_found(kind: str, changes: dict[str, Any]) -> None:
    assert measure_reach(AutoConfig.for_model(kind, **changes)).looks_ahead > 0.01


def test_an_encoder_that_is_set_up_as_a_decoder_does_not_look_ahead() -> None:
    assert measure_reach(AutoConfig.for_model("bert", is_decoder=True)).looks_ahead == 0.0


def test_a_tower_that_no_text_goes_through_is_not_reached() -> None:
    sizes = {**TEXT, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TEXT, **HEADS, "head_dim": 8},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
    )
    unreached = measure_reach(config).unreached
    assert "model.vision_tower.encoder.layers.*.self_attn.q_proj" in unreached
    assert not any("language_model" in sort for sort in unreached)


def test_a_weight_that_is_used_without_its_module_is_not_reached() -> None:
    # an adapter beside it would change nothing
    assert measure_reach(AutoConfig.for_model("mamba")).unreached == {
        "backbone.layers.*.mixer.dt_proj"
    }


def test_experts_that_get_no_token_are_reached_all_the_same() -> None:
    assert measure_reach(AutoConfig.for_model("qwen2_moe")).unreached == frozenset()


def test_a_class_that_cannot_be_made_small_is_measured_as_it_is() -> None:
    sizes = {"d_model": 24, "decoder_layers": 1, "decoder_attention_heads": 12}
    config = AutoConfig.for_model("plbart", **sizes, decoder_ffn_dim=48, vocab_size=100)
    found = measure_reach(config)
    assert (found.looks_ahead, found.unknown) == (0.0, "")


def test_a_base_that_cannot_be_measured_is_reported_and_leaves_the_generator_alone() -> None:
    rotary = {"rope_type": "default", "rope_theta": "broad"}
    state = torch.random.get_rng_state()
    found = measure_reach(AutoConfig.for_model("llama", rope_parameters=rotary))
    assert found.unknown.startswith("no small LlamaConfig computes (")
    assert torch.equal(torch.random.get_rng_state(), state)
