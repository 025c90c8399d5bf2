"""The check finds, for each kind of decoder, a layout that gives the results of rows alone."""

import copy
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedllm.errors import ConfigError, ModelError
from fedllm.packing.layout_check import find_layout, is_still_valid
from fedllm.storage.records import LayoutRecord

WINDOW = {"sliding_window": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def layout_for(kind: str, cutoff_tokens: int = 512, **changes: Any) -> LayoutRecord:
    return find_layout(AutoConfig.for_model(kind, **changes), cutoff_tokens=cutoff_tokens)


@pytest.mark.parametrize(
    ("kind", "changes", "cpu", "cuda"),
    [
        ("llama", {}, "parts", "flex"),
        ("llama", {"num_key_value_heads": 1}, "parts", "flex"),
        ("llama", {"rope_parameters": LLAMA3}, "parts", "flex"),
        ("llama", {"attention_dropout": 0.1}, "parts", "mask"),
        ("qwen2", {}, "parts", "flex"),
        (
            "qwen2",
            {"use_sliding_window": True, **WINDOW, "max_window_layers": 1},
            "parts",
            "packed",
        ),
        ("qwen3", {"head_dim": 128}, "parts", "flex"),
        ("qwen3_moe", {}, "parts", "flex"),
        ("mistral", WINDOW, "parts", "packed"),
        ("mistral", {"sliding_window": 4096}, "parts", "flex"),
        ("gemma2", WINDOW, "packed", "packed"),
        ("gemma3_text", WINDOW, "parts", "packed"),
        ("gpt_neox", {}, "parts", "mask"),
        ("phi", {}, "parts", "flex"),
        ("phi3", WINDOW, "parts", "packed"),
        ("gpt2", {}, "parts", "mask"),
        ("opt", {}, "parts", "flex"),
        ("stablelm", {}, "mask", "mask"),
        ("olmo2", {}, "parts", "flex"),
        ("cohere2", WINDOW, "parts", "packed"),
        ("granite", {}, "parts", "flex"),
        ("starcoder2", WINDOW, "parts", "packed"),
        ("doge", {}, "mask", "mask"),
        ("cwm", {}, "parts", "flex"),
        ("modernbert-decoder", {}, "parts", "packed"),
        ("bloom", {}, "padded", "padded"),
        ("falcon", {"alibi": True}, "padded", "padded"),
        ("mamba", {}, "padded", "padded"),
    ],
)
def test_every_decoder_gets_the_best_layout_it_computes_right(
    kind: str, changes: dict[str, Any], cpu: str, cuda: str
) -> None:
    found = layout_for(kind, **changes)
    assert (found.cpu, found.cuda) == (cpu, cuda)
    assert bool(found.why) == (cpu != "parts" or cuda not in {"flex", "mask"})


def test_the_reason_names_the_model_and_what_is_wrong_with_better_layouts() -> None:
    found = layout_for("gemma2", **WINDOW)
    assert found.why.startswith("Gemma2ForCausalLM: parts: ModelError: Gemma2Attention: its ")
    assert "softcap" in found.why
    assert "mask: relative error" in found.why
    assert "padded" not in found.why


def test_block_masks_that_a_model_ignores_are_not_taken() -> None:
    found = layout_for("doge")
    assert found.cuda == "mask"
    assert "; flex: relative error " in found.why


def test_rows_do_not_share_a_prefix_if_decoding_from_their_cache_fails() -> None:
    found = layout_for("deepseek_v32")
    assert {found.cpu, found.cuda} <= {"packed", "padded"}
    assert "mask: ValueError: Cannot call `update_indexer`" in found.why


def test_a_window_longer_than_every_row_is_ignored() -> None:
    assert layout_for("mistral", cutoff_tokens=64, **WINDOW).cuda == "flex"
    assert layout_for("mistral", cutoff_tokens=65, **WINDOW).cuda == "packed"


def test_the_check_leaves_configuration_and_generator_alone() -> None:
    config = AutoConfig.for_model("gemma3_text", **WINDOW)
    before, state = copy.deepcopy(config.to_dict()), torch.random.get_rng_state()
    assert find_layout(config, cutoff_tokens=512) == find_layout(config, cutoff_tokens=512)
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_cannot_be_made_small_is_padded_with_the_reason() -> None:
    found = layout_for("llama", rope_parameters={"rope_type": "default", "rope_theta": "broad"})
    assert (found.cpu, found.cuda) == ("padded", "padded")
    assert found.why.startswith("a small LlamaConfig cannot be made (")


def test_a_model_that_stays_large_is_not_computed_with() -> None:
    found = layout_for("mamba", state_size=1 << 16)
    assert (found.cpu, found.cuda) == ("padded", "padded")
    assert re.search(r"cannot be made \([\d,]+ parameters remain\)$", found.why)


class CarelessConfig(LlamaConfig):
    """The configuration of a decoder whose attention sees all earlier tokens."""

    model_type = "careless"


class Careless(LlamaForCausalLM):
    """A decoder that ignores masks and positions without a warning."""

    config_class = CarelessConfig

    def forward(self, input_ids: Any = None, use_cache: bool = False, **_ignored: Any) -> Any:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


@pytest.fixture
def careless() -> CarelessConfig:
    AutoConfig.register("careless", CarelessConfig, exist_ok=True)
    AutoModelForCausalLM.register(CarelessConfig, Careless, exist_ok=True)
    return CarelessConfig(vocab_size=64, hidden_size=32, intermediate_size=48)


def test_a_model_that_ignores_masks_is_refused_unless_its_rows_are_computed_alone(
    careless: CarelessConfig,
) -> None:
    with pytest.raises(ModelError) as refused:
        find_layout(careless, cutoff_tokens=100)
    assert "Careless computes a row differently beside others (relative error" in str(refused.value)
    assert str(refused.value).endswith(
        "need training.micro_batch_size: 1 and evaluation.batch_size: 1"
    )
    apart = find_layout(careless, cutoff_tokens=100, rows_apart=True)
    assert (apart.cpu, apart.cuda) == ("padded", "padded")


def test_a_model_that_differs_only_beyond_its_window_is_padded_with_the_reason() -> None:
    found = layout_for("doge", cutoff_tokens=4096)
    assert (found.cpu, found.cuda) == ("padded", "padded")
    assert found.why.startswith("DogeForCausalLM, where rows are longer than its window: parts: ")
    assert "; padded: relative error " in found.why
    with pytest.raises(ModelError, match=r"Doge.* differently beside others"):
        layout_for("doge", cutoff_tokens=4096, keep_window_size=5)


@pytest.mark.parametrize(
    ("kind", "window", "wrong"),
    [("deepseek_v32", "index_topk", "parts"), ("doge", "keep_window_size", "mask")],
)
def test_a_model_that_prunes_keys_by_length_is_checked_beyond_that_length(
    kind: str, window: str, wrong: str
) -> None:
    short, long = (layout_for(kind, cutoff_tokens=cutoff, **{window: 64}) for cutoff in (65, 64))
    assert f"{wrong}: relative error" in short.why
    assert f"{wrong}: relative error" not in long.why


@pytest.mark.parametrize(
    ("rotary", "most"),
    [
        ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, 2048),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
                "original_max_position_embeddings": 256,
            },
            256,
        ),
    ],
    ids=["dynamic", "longrope"],
)
def test_rows_whose_result_depends_on_their_neighbours_length_are_refused(
    rotary: dict[str, Any], most: int
) -> None:
    config = AutoConfig.for_model("llama", rope_parameters=rotary)
    assert find_layout(config, cutoff_tokens=most).cpu == "parts"
    with pytest.raises(
        ConfigError, match=rf"cutoff_tokens: got {most + 1}, .* need at most {most}$"
    ):
        find_layout(config, cutoff_tokens=most + 1)
    assert find_layout(config, cutoff_tokens=most - 8, longest_answer=8).cpu == "parts"
    with pytest.raises(
        ConfigError,
        match=rf"got {most - 8} and evaluation\.max_new_tokens: 9, .* at most {most} together$",
    ):
        find_layout(config, cutoff_tokens=most - 8, longest_answer=9)


@pytest.mark.parametrize(
    ("recorded", "found", "holds"),
    [
        (("parts", "flex"), ("parts", "flex"), True),
        (("mask", "mask"), ("parts", "flex"), True),
        (("parts", "mask"), ("parts", "flex"), True),
        (("parts", "flex"), ("parts", "mask"), False),
        (("parts", "flex"), ("mask", "flex"), False),
        (("parts", "flex"), ("parts", "packed"), False),
    ],
)
def test_a_layout_that_failed_the_check_is_no_longer_valid(
    recorded: tuple[Any, Any], found: tuple[Any, Any], holds: bool
) -> None:
    before, now = (LayoutRecord(cpu=cpu, cuda=cuda) for cpu, cuda in (recorded, found))
    assert is_still_valid(before, now) is holds
