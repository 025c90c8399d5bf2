"""A module is recognised by all names that adapters have for it."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from fedllm.adapters.base_copies import check_copies
from fedllm.adapters.peft_config import AdapterConfig
from fedllm.adapters.peft_files import read_peft_adapter
from fedllm.adapters.tensor_names import common_names, factor_key, names_in, place_of
from fedllm.cli.main import run as fedllm
from fedllm.errors import AdapterError
from tests.adapters.peft_folders import (
    deltas,
    edit_config,
    make_llama,
    rename_tensors,
    save_adapter,
    weighted_mean,
)

Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def pair(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    return [save_adapter(llama, root / f"{n}", seed=n, r=n + 1) for n in (1, 2)]


@pytest.fixture
def copies(pair: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in pair]


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for module, change in expected.items():
        assert float((found[module] - change).norm()) < 1e-5 * float(change.norm()), module


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert fedllm([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def within(old: str, new: str) -> Rename:
    return lambda name: name.replace(old, new, 1)


WRAPPED: Mapping[str, Rename] = {
    "compiled": within("base_model.model.", "base_model.model._orig_mod."),
    "compiled_peft": lambda name: f"_orig_mod.{name}",
    "compiled_layers": lambda name: re.sub(r"(layers\.\d)", r"\1._orig_mod", name),
    "ddp": lambda name: f"module.{name}",
    "ddp_within": within("base_model.model.", "base_model.model.module."),
    "fsdp": lambda name: (
        "_fsdp_wrapped_module."
        + re.sub(r"(layers\.\d)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module", name)
    ),
    "named_default": within(".weight", ".default.weight"),
    "named_otherwise": within(".weight", ".site-a.weight"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_wrapped_a_client_s_model_does_not_part_its_modules(
    llama: Path, pair: list[Path], copies: list[Path], tmp_path: Path, kind: str
) -> None:
    rename_tensors(copies[1], WRAPPED[kind])
    out = tmp_path / "out"
    assert fedllm(["aggregate", *map(str, copies), "--out", str(out), "--rank", "full"]) == 0
    same(deltas(llama, out), weighted_mean([deltas(llama, f) for f in pair], [1.0, 1.0]))


def test_two_tensors_of_one_module_are_refused_by_name(
    copies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copies[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    other = first.replace(".weight", ".second.weight")
    save_file({**tensors, other: tensors[first].clone()}, path)
    said = refusal(capsys, "aggregate", *copies, "--out", tmp_path / "out")
    assert first in said
    assert other in said


def llava_config() -> LlavaConfig:
    text = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=39, vision_feature_layer=-1
    )


def make_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    LlavaForConditionalGeneration(llava_config()).save_pretrained(folder)
    return folder


def before_4_52(name: str) -> str:
    name = name.replace("model.language_model.", "language_model.model.", 1)
    name = name.replace("base_model.model.model.vision", "base_model.model.vision", 1)
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


@pytest.mark.parametrize("old", [0, 1])
def test_names_of_vision_language_models_before_and_after_their_renaming_are_one(
    tmp_path: Path, old: int
) -> None:
    kind = LlavaForConditionalGeneration
    base = make_llava(tmp_path / "base")
    folders = [
        save_adapter(base, tmp_path / f"{n}", seed=n, r=n + 1, kind=kind, alpha_pattern=alphas)
        for n, alphas in enumerate([{}, {"model.language_model.layers.0.self_attn.q_proj": 3}])
    ]
    expected = weighted_mean([deltas(base, f, kind=kind) for f in folders], [1.0, 1.0])
    assert any("vision" in module for module in expected)
    rename_tensors(folders[old], before_4_52)
    assert any("language_model.model." in name for name in read_peft_adapter(folders[old]).factors)
    out = tmp_path / "out"
    assert fedllm(["aggregate", *map(str, folders), "--out", str(out), "--rank", "full"]) == 0
    same(deltas(base, out, kind=kind), expected)


OLD_NAMES = [
    "language_model.model.layers.0.self_attn.q_proj",
    "language_model.lm_head",
    "vision_tower.encoder.layers.0.self_attn.q_proj",
    "multi_modal_projector.linear_1",
    "model.layers.0.self_attn.q_proj",
    "visual.blocks.0.attn.qkv",
]
FAMILIES = ["llava", "llava_next", "gemma3", "mistral3", "internvl", "aya_vision", "video_llava"]
FAMILIES += ["paligemma", "mllama", "fuyu", "qwen2_audio", "granite_speech", "got_ocr2"]
FAMILIES += ["Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"]
FAMILIES += ["paddleocr_vl", "Qwen2_5OmniThinkerForConditionalGeneration", "GPTNeoXForCausalLM"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_that_transformers_renames_keeps_its_place(family: str) -> None:
    renamings = [
        entry
        for entry in get_checkpoint_conversion_mapping(family)
        if isinstance(entry, WeightRenaming)
    ]
    renamed = 0
    for old in [*OLD_NAMES, "embed_out"]:
        new = rename_source_key(f"{old}.weight", renamings, [])[0].removesuffix(".weight")
        assert place_of(new) == place_of(old)
        assert names_in([old], [new]) == {old: new}
        assert set(common_names([[old], [new]]).values()) == {new}
        renamed += new != old
    assert renamed


def test_places_of_one_model_are_as_many_as_its_modules() -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config())
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len({place_of(name) for name in linear}) == len(linear) > 10


def test_a_module_that_only_the_old_names_have_gets_a_name_of_its_neighbours() -> None:
    old = [f"language_model.model.layers.0.self_attn.{leaf}_proj" for leaf in "qv"]
    new = ["model.language_model.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.qkv"]
    names = common_names([old, new])
    assert names[old[1]] == "model.language_model.layers.0.self_attn.v_proj"
    assert names[new[1]] == new[1]


def test_names_that_all_adapters_agree_on_stay_as_they_are() -> None:
    old = ["language_model.model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv"]
    assert common_names([old, old]) == {name: name for name in old}


@pytest.mark.parametrize(
    "name", ["model.layers.0.q_proj.lora_A.weight", "base_model.model.q.lora_C.weight", "lora_A"]
)
def test_a_tensor_that_is_no_factor_has_no_key(name: str) -> None:
    assert factor_key(name) is None


def test_a_pattern_finds_a_module_by_any_of_its_whole_names() -> None:
    config = AdapterConfig(
        lora_alpha=8,
        alpha_pattern={"^language_model.model.layers.0.q_proj": 3, r"_orig_mod\.lm_head": 5},
    )
    assert config.scale("model.language_model.layers.0.q_proj") == 3 / 8
    assert config.scale("lm_head") == 5 / 8
    assert config.scale("model.language_model.layers.1.q_proj") == 1


# --- modules that only part of the adapters have


def test_few_modules_in_common_are_refused_unless_they_are_allowed(
    llama: Path, pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_adapter(llama, tmp_path / "other", target_modules=["q_proj", "up_proj"])
    arguments = ["aggregate", pair[0], other, "--out", tmp_path / "out"]
    said = refusal(capsys, *arguments)
    assert "4 of 6 modules are not in all adapters" in said
    assert "--allow-missing" in said
    assert fedllm([*map(str, arguments), "--allow-missing"]) == 0
    assert "4 of 6 modules: in 1 of 2 adapters only" in capsys.readouterr().out
    expected = weighted_mean([deltas(llama, f) for f in (pair[0], other)], [1.0, 1.0])
    assert set(deltas(llama, tmp_path / "out")) == set(expected)


# --- one base under several names


def test_a_base_in_two_places_is_one_by_its_content(
    llama: Path, copies: list[Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(llama, tmp_path / "moved")
    edit_config(copies[1], base_model_name_or_path=str(moved))
    assert fedllm(["aggregate", *map(str, copies), "--out", str(tmp_path / "out")]) == 0


def test_a_base_that_is_not_here_is_named_by_an_option(
    llama: Path, copies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in zip(copies, ("/site-a/llama", "/site-b/llama"), strict=True):
        edit_config(folder, base_model_name_or_path=name)
    arguments = ["aggregate", *copies, "--out", tmp_path / "out"]
    assert "--base PATH" in refusal(capsys, *arguments)
    assert fedllm([*map(str, arguments), "--base", str(llama)]) == 0
    raw = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    assert raw["base_model_name_or_path"] == str(llama)


def test_an_option_does_not_make_two_bases_one(
    llama: Path, copies: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_llama(tmp_path / "other", seed=1)
    said = refusal(capsys, "aggregate", *copies, "--out", tmp_path / "out", "--base", other)
    assert f"--base: {other} is another model than {llama}" in said
    said = refusal(capsys, "aggregate", *copies, "--out", tmp_path / "out", "--base", "no/such/one")
    assert "no such folder" in said


# --- copies of base weights that PEFT saves

heads_are_saved = pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers")


@pytest.fixture
def heads(llama: Path, tmp_path: Path) -> list[Path]:
    targets = ["q_proj", "lm_head"]
    return [
        save_adapter(llama, tmp_path / f"head{n}", seed=n, r=n, target_modules=targets)
        for n in (1, 2)
    ]


def change_copy(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 1] += 0.5
    save_file(tensors, path)


@heads_are_saved
@pytest.mark.parametrize("here", [True, False])
def test_the_head_is_combined_and_the_copy_of_its_weight_left_out(
    llama: Path, heads: list[Path], tmp_path: Path, here: bool
) -> None:
    if not here:
        for folder in heads:
            edit_config(folder, base_model_name_or_path="owner/away")
    out = tmp_path / "out"
    assert fedllm(["aggregate", *map(str, heads), "--out", str(out), "--rank", "full"]) == 0
    same(deltas(llama, out), weighted_mean([deltas(llama, f) for f in heads], [1.0, 1.0]))


@heads_are_saved
@pytest.mark.parametrize("here", [True, False])
def test_a_changed_copy_is_refused_with_the_remedy(
    heads: list[Path], tmp_path: Path, here: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    change_copy(heads[1])
    if not here:
        for folder in heads:
            edit_config(folder, base_model_name_or_path="owner/away")
    said = refusal(capsys, "aggregate", *heads, "--out", tmp_path / "out")
    assert f"{heads[1]}: base_model.model.lm_head.base_layer.weight differs from" in said
    assert "save_embedding_layers=False" in said


def test_a_whole_weight_that_nothing_is_known_of_is_refused(
    copies: list[Path],
) -> None:
    path = copies[0] / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.weight"
    save_file({**load_file(path), name: torch.zeros(40, 16)}, path)
    with pytest.raises(AdapterError, match=rf"{name}.*--base PATH"):
        check_copies([read_peft_adapter(folder) for folder in copies], None)
