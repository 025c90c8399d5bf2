"""An adapter folder gives the same factors as in PEFT."""

import json
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from fedllm.adapters.peft_config import AdapterConfig
from fedllm.adapters.peft_files import read_peft_adapter
from fedllm.adapters.peft_writer import PeftDescription, write_peft_adapter
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors, delta
from tests.adapters.peft_folders import deltas, save_adapter

KINDS = ["plain", "rslora", "patterns", "regex", "bfloat16", "float16"]


@pytest.mark.parametrize("kind", KINDS)
def test_factors_give_the_change_that_peft_computes(
    llama: Path, zoo: dict[str, Path], kind: str
) -> None:
    adapter = read_peft_adapter(zoo[kind])
    expected = deltas(llama, zoo[kind])
    assert set(adapter.factors) == set(expected)
    for module, change in expected.items():
        torch.testing.assert_close(delta(adapter.factors[module]), change, rtol=1e-5, atol=1e-5)
        assert adapter.factors.rank(module) == adapter.factors[module].rank
        assert adapter.factors.shape(module) == adapter.factors[module].shape


def test_conv1d_factors_are_out_by_in_like_all_others(gpt2: Path, tmp_path: Path) -> None:
    folder = save_adapter(
        gpt2, tmp_path / "a", r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True
    )
    factors = read_peft_adapter(folder).factors
    shape = factors.shape("transformer.h.0.attn.c_attn")
    assert (shape.out, shape.in_) == (48, 16)
    for module, change in deltas(gpt2, folder).items():
        torch.testing.assert_close(delta(factors[module]), change, rtol=1e-5, atol=1e-5)


def test_an_adapter_names_its_base(llama: Path, zoo: dict[str, Path]) -> None:
    assert read_peft_adapter(zoo["plain"]).base_model == str(llama)


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"q_proj": 4},
        {"proj": 4},
        {"0.self_attn.q_proj": 4, "q_proj": 5},
        {"q_proj": 5, "0.self_attn.q_proj": 4},
        {"layers.*_proj": 3},
        {"^model.layers.1.mlp.up_proj": 9},
        {"model.layers.1.mlp.up_proj": 9},
        {r"mlp\.(up|down)_proj|k_proj": 7},
    ],
)
def test_patterns_match_as_in_peft(patterns: dict[str, int]) -> None:
    config = AdapterConfig(r=2, rank_pattern=patterns)
    for module in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.up_proj",
        "vision.model.layers.1.mlp.up_proj",
        "q_proj",
        "my_q_proj",
    ):
        assert config.rank(module) == patterns.get(get_pattern_key(list(patterns), module), 2)


def test_what_is_written_is_read_back_as_the_same_changes(tmp_path: Path) -> None:
    adapter = {
        f"model.{place}.q": Factors(
            a_RI=torch.randn(rank, 7), b_OR=torch.randn(9, rank), scale=16 / rank**power
        )
        for place, (rank, power) in enumerate([(1, 1), (3, 1), (5, 0.5), (7, 0.5), (6, 0)])
    }
    about = PeftDescription(base_model=None, targets={"target_modules": ["q"]})
    write_peft_adapter(tmp_path / "a", adapter, about=about)
    read = read_peft_adapter(tmp_path / "a").factors
    for module, factors in adapter.items():
        assert (read.rank(module), read.scale(module)) == (7, 2.0)
        torch.testing.assert_close(delta(read[module]), delta(factors), rtol=1e-5, atol=1e-5)


def test_factors_of_the_common_rank_and_scale_are_written_bit_by_bit(tmp_path: Path) -> None:
    factors = Factors(a_RI=torch.randn(3, 7), b_OR=torch.randn(9, 3), scale=2.0)
    about = PeftDescription(base_model=None, targets={"target_modules": ["q"]})
    write_peft_adapter(tmp_path / "a", {"q": factors}, about=about)
    read = read_peft_adapter(tmp_path / "a").factors["q"]
    assert torch.equal(read.a_RI, factors.a_RI)
    assert torch.equal(read.b_OR, factors.b_OR)


def test_a_value_beyond_the_number_format_is_refused(tmp_path: Path) -> None:
    huge = {"q": Factors(a_RI=torch.ones(1, 2), b_OR=torch.full((2, 1), 1e6), scale=1.0)}
    about = PeftDescription(base_model=None, targets={"target_modules": ["q"]})
    with pytest.raises(AdapterError, match=r"q\.lora_B\.weight.*float16"):
        write_peft_adapter(tmp_path, huge, about=about, dtype=torch.float16)


def changed(zoo: dict[str, Path], folder: Path, **fields: object) -> Path:
    """Copy the plain adapter with other fields in its configuration."""
    folder.mkdir()
    raw = json.loads((zoo["plain"] / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps(raw | fields))
    tensors = zoo["plain"] / "adapter_model.safetensors"
    (folder / "adapter_model.safetensors").write_bytes(tensors.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 0}, "r: got 0"),
        ({"r": "eight"}, "r: got 'eight'"),
        ({"r": 3}, "rank 3.*rank 2"),
        ({"rank_pattern": {"v_proj": 4}}, "v_proj.*rank 4"),
        ({"rank_pattern": {"v_proj(": 4}}, "regular expression"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_a_configuration_that_is_more_than_lora_or_broken_is_refused_by_name(
    zoo: dict[str, Path], tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    folder = changed(zoo, tmp_path / "broken", **fields)
    with pytest.raises(AdapterError, match=rf"(?s){folder}.*{words}"):
        read_peft_adapter(folder)


def test_a_missing_pattern_or_start_is_as_if_it_were_empty(
    zoo: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(zoo, tmp_path / "old", rank_pattern=None, alpha_pattern=None, bias=None)
    assert read_peft_adapter(folder).config.rank_pattern == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding LoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "trained bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "trained bias"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "tokens"),
        ("base_model.model.score.weight", "no base_model"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "no base_model"),
    ],
)
def test_any_tensor_that_is_no_a_or_b_is_refused_by_name(
    zoo: dict[str, Path], tmp_path: Path, name: str, words: str
) -> None:
    folder = changed(zoo, tmp_path / "more")
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), name: torch.zeros(2)}, path)
    with pytest.raises(AdapterError, match=f"{folder}: {name} is .*{words}"):
        read_peft_adapter(folder)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no lora_A"),
        ({f"{Q}A.weight": torch.zeros(2, 16)}, "has no lora_B"),
        (
            {f"{Q}A.weight": torch.zeros(2, 16), f"{Q}B.weight": torch.zeros(16, 3)},
            r"lora_A is \(2, 16\) and lora_B \(16, 3\)",
        ),
        (
            {f"{Q}A.weight": torch.zeros(2, 3, 1, 1), f"{Q}B.weight": torch.zeros(3, 2, 1, 1)},
            r"lora_A is \(2, 3, 1, 1\)",
        ),
        (
            {f"{Q}A.weight": torch.zeros(2, 0), f"{Q}B.weight": torch.zeros(16, 2)},
            "without gathering",
        ),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    zoo: dict[str, Path], tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    folder = changed(zoo, tmp_path / "misshapen")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=words):
        read_peft_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_adapter_and_tensor(
    zoo: dict[str, Path], tmp_path: Path, value: float
) -> None:
    folder = changed(zoo, tmp_path / "diverged")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}B.weight"][3, 1] = value
    save_file(tensors, path)
    factors = read_peft_adapter(folder).factors
    with pytest.raises(AdapterError, match=rf"{folder}: {Q}B\.weight holds NaN or infinity"):
        factors["model.layers.0.self_attn.q_proj"]


def test_numbers_that_are_no_floats_are_refused(zoo: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(zoo, tmp_path / "integers")
    path = folder / "adapter_model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(path).items()}, path)
    factors = read_peft_adapter(folder).factors
    with pytest.raises(AdapterError, match="holds int8"):
        factors["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("size", [0, 5, 100, -200, -1])
def test_a_truncated_file_is_refused(zoo: dict[str, Path], tmp_path: Path, size: int) -> None:
    folder = changed(zoo, tmp_path / "cut")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(AdapterError, match=f"{path}: not a whole tensor file"):
        read_peft_adapter(folder)


def test_a_pickled_adapter_is_refused_by_name_and_never_read(
    zoo: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(zoo, tmp_path / "pickled")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, which is pickled"):
        read_peft_adapter(folder)


def test_a_folder_that_is_no_adapter_says_what_is_missing(
    zoo: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read_peft_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_peft_adapter(tmp_path)
    with pytest.raises(AdapterError, match="is a file"):
        read_peft_adapter(zoo["plain"] / "adapter_config.json")
    folder = changed(zoo, tmp_path / "half")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_peft_adapter(folder)
    (folder / "adapter_model.safetensors").mkdir()
    with pytest.raises(AdapterError, match="cannot be read"):
        read_peft_adapter(folder)
    for content in ("{", "[]", "\udcff"):
        (folder / "adapter_config.json").write_text(content, errors="surrogateescape")
        with pytest.raises(AdapterError, match=r"adapter_config\.json"):
            read_peft_adapter(folder)
