"""Every base that a user gives works, or is refused in one line that says what to do."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedllm.config.loading import load_config, override_config
from fedllm.config.models import Config
from fedllm.config.target_modules import is_target
from fedllm.errors import ModelError
from fedllm.model.base import load_base
from fedllm.programs.prepare import prepare
from fedllm.storage.paths import CachePaths
from tests.tiny import Tiny

SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "num_experts": 4}
DEFAULT = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    """Return a copy of the small base that a test may change."""
    return Path(shutil.copytree(tiny.model, tmp_path / "base"))


@pytest.fixture
def prepared(tiny: Tiny, base: Path, tmp_path: Path) -> Callable[..., tuple[Any, list[str]]]:
    """Prepare the base with changed keys; return the record and the lines that were said."""

    def prepare_base(*changes: str) -> tuple[Any, list[str]]:
        lines: list[str] = []
        # one rank for all modules, whichever are adapted
        own = [f"model.path={base}", "clients.tiers.large.ranks=4"]
        config: Config = override_config(load_config(tiny.config), [*own, *changes])
        record = prepare(config, CachePaths(root=tmp_path / "cache"), lines.append)
        return record, lines

    return prepare_base


@pytest.fixture
def refused(prepared: Callable[..., Any]) -> Callable[..., str]:
    """Return the line with which the base is refused."""

    def refuse(*changes: str) -> str:
        with pytest.raises(ModelError) as raised:
            prepared(*changes)
        line = str(raised.value)
        assert "\n" not in line
        assert line.startswith(("model.path: ", "lora.target_modules: "))
        return line

    return refuse


def save_random(folder: Path, kind: str, **sizes: Any) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --- what a measurement refuses


@pytest.mark.parametrize("kind", ["bert", "roformer"])
def test_tokens_that_see_later_ones_are_refused_by_measuring(
    base: Path, refused: Callable[..., str], kind: str
) -> None:
    save_random(base, kind, **SIZES, intermediate_size=48)
    line = refused("lora.target_modules=[query, value]")
    assert "see later ones" in line
    assert "logits of earlier tokens moved by " in line


def with_vision(folder: Path) -> None:
    text = {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}
    vision = {**SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
    del vision["vocab_size"]
    save_random(
        folder, "gemma3", text_config=text, vision_config=vision, image_token_index=257,
        boi_token_index=256, eoi_token_index=255, mm_tokens_per_image=4,
    )  # fmt: skip


@pytest.mark.parametrize("targets", ["[q_proj, v_proj]", ".*(q_proj|v_proj)", "all-linear"])
def test_a_vision_tower_is_refused_with_the_names_of_the_language_model(
    base: Path,
    refused: Callable[..., str],
    prepared: Callable[..., tuple[Any, list[str]]],
    targets: str,
) -> None:
    with_vision(base)
    line = refused(f"lora.target_modules={targets}")
    assert "model.vision_tower.encoder.layers.*." in line
    assert "would stay zero" in line
    # what the line offers names the language model, and nothing else
    offer = line.rpartition("lora.target_modules: ")[2]
    record, lines = prepared(f"lora.target_modules={offer}")
    assert all(".language_model.layers." in path for path in record.modules)
    assert len(record.modules) == (4 if "proj" in targets else 14)
    assert not any("lora.target_modules" in line for line in lines)


def test_modules_that_no_text_reaches_are_said_where_they_are_named_in_full(
    base: Path, prepared: Callable[..., tuple[Any, list[str]]]
) -> None:
    with_vision(base)
    path = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    record, lines = prepared(f"lora.target_modules=[{path}, language_model.layers.0.mlp.up_proj]")
    assert path in record.modules
    assert any("would stay zero" in line for line in lines)


def test_the_default_targets_are_refused_where_they_leave_the_experts_out(
    base: Path, refused: Callable[..., str], prepared: Callable[..., tuple[Any, list[str]]]
) -> None:
    save_random(base, "qwen2_moe", **LLAMA, **EXPERTS)
    line = refused()
    # per layer: a shared expert of 3 x 32 x 32 (and its gate, 32), four experts of 3 x 16 x 32
    assert f"cover {3072 / (3072 + 32 + 4 * 1536):.0%} of the MLP parameters" in line
    assert "model.layers.*.mlp.experts.gate_up_proj" in line
    offer = line.rpartition("lora.target_modules: ")[2]
    record, lines = prepared(f"lora.target_modules={offer}")
    assert sum("cover 33% of the MLP parameters" in line for line in lines) == 1
    assert {path.split(".")[-2] for path in record.modules} == {"self_attn", "shared_expert"}


def test_targets_that_miss_the_experts_are_said_where_the_user_named_them(
    base: Path, refused: Callable[..., str], prepared: Callable[..., tuple[Any, list[str]]]
) -> None:
    save_random(base, "mixtral", **LLAMA, num_local_experts=4)
    line = refused()
    assert "no module `gate_proj`" in line
    assert "routed experts" in line
    assert "[q_proj, k_proj, v_proj, o_proj]" in line
    _, lines = prepared("lora.target_modules=[q_proj, v_proj]")
    assert any("cover 0% of the MLP parameters: the routed experts" in line for line in lines)


def test_a_base_with_other_names_is_refused_with_its_own(
    base: Path, refused: Callable[..., str], prepared: Callable[..., tuple[Any, list[str]]]
) -> None:
    save_random(base, "gpt_neox", **SIZES, intermediate_size=48)
    offer = refused().rpartition("lora.target_modules: ")[2]
    assert offer == "[query_key_value, dense, dense_h_to_4h, dense_4h_to_h]"
    assert len(prepared(f"lora.target_modules={offer}")[0].modules) == 8


# --- tokenizers


def add_tokens(folder: Path, *tokens: str, template: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def test_a_token_of_the_template_beyond_the_embedding_is_refused(
    base: Path, refused: Callable[..., str]
) -> None:
    add_tokens(base, "<|turn|>", template="{% for m in messages %}<|turn|>{% endfor %}")
    line = refused()
    assert "token <|turn|> has id 258" in line
    assert "258 rows" in line
    assert "259 tokens" in line


def test_a_pad_token_beyond_the_embedding_is_refused(
    base: Path, refused: Callable[..., str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    assert "token [PAD] has id 258" in refused()


def test_a_token_that_no_text_is_made_of_is_said_unless_a_row_holds_it(
    tiny: Tiny,
    base: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    prepared: Callable[..., tuple[Any, list[str]]],
) -> None:
    add_tokens(base, "<image>")
    assert any("the tokenizer knows <image>" in line for line in prepared()[1])
    rows = [json.loads(line) for line in tiny.data.read_text("utf-8").splitlines()]
    rows[7]["input"] = "an <image> here"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert "token <image> has id 258" in refused(f"data.path={data}", "data.cutoff_tokens=400")


def test_a_sentencepiece_model_is_refused_with_the_packages_that_read_it(
    base: Path, refused: Callable[..., str]
) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    line = refused()
    assert "tokenizer.model" in line
    assert "pip install sentencepiece" in line
    assert "bug" not in line


def test_a_tokenizer_whose_vocabulary_is_missing_is_refused(
    base: Path, refused: Callable[..., str]
) -> None:
    (base / "tokenizer.json").unlink()
    raw = json.loads((base / "tokenizer_config.json").read_text())
    raw["tokenizer_class"] = "LlamaTokenizer"
    (base / "tokenizer_config.json").write_text(json.dumps(raw))
    assert "tokenizer" in refused()


# --- quantised weights


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_quantised_weights_are_refused_by_their_kind(
    base: Path, refused: Callable[..., str], section: dict[str, Any], kind: str
) -> None:
    edit_config(base, quantization_config=section)
    assert f"is quantised ({kind})" in refused()


def test_quantised_weights_are_refused_where_only_another_file_or_the_tensors_say_so(
    base: Path, refused: Callable[..., str]
) -> None:
    (base / "quantize_config.json").write_text("{}")
    assert "is quantised (GPTQ)" in refused()
    (base / "quantize_config.json").unlink()
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert f"is quantised ({name} holds F8_E4M3)" in refused()


def test_gguf_files_are_refused_as_quantised(base: Path, refused: Callable[..., str]) -> None:
    (base / "model.safetensors").rename(base / "model-Q4_K_M.gguf")
    assert "GGUF" in refused()
    assert "GGUF" in refused(f"model.path={base / 'model-Q4_K_M.gguf'}")


# --- Python code in a folder


CODE = """
import pathlib
pathlib.Path(__file__).with_name("EXECUTED").write_text("")
from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as Own
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}


@pytest.mark.parametrize("answer", ["", "y\ny\ny\n"])
@pytest.mark.parametrize("where", ["config", "model", "tokenizer"])
def test_python_code_of_a_folder_is_never_run(
    base: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    where: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    (base / "own.py").write_text(CODE)
    if where == "config":
        edit_config(base, model_type="own", auto_map=AUTO_MAP)
    elif where == "model":
        edit_config(base, model_type="vit", auto_map=AUTO_MAP)
    else:
        file = base / "tokenizer_config.json"
        own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    line = refused()
    assert "Python code" in line
    assert str(base) in line
    assert not (base / "EXECUTED").exists()


def test_a_model_that_transformers_has_is_loaded_without_the_code_beside_it(
    base: Path, prepared: Callable[..., tuple[Any, list[str]]]
) -> None:
    (base / "own.py").write_text(CODE)
    edit_config(base, auto_map=AUTO_MAP)
    assert len(prepared()[0].modules) == 14
    assert type(load_base(base, dtype="float32", device="cpu").model).__name__ == "LlamaForCausalLM"
    assert not (base / "EXECUTED").exists()


# --- files that are not whole


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def index_of_missing_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, "cut short"),
        (pointer, "git lfs pull"),
        (index_of_missing_shards, "lacks model-00002-of-00002.safetensors, 1 of the 2 files"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
            "holds other.safetensors, but neither model.safetensors nor its index",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, need keys"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "cannot be loaded"),
        (lambda folder: edit_config(folder, hidden_size=48), "by config.json it is 258x48"),
        (lambda folder: edit_config(folder, vocab_size=300), "by config.json it is 300x32"),
        (lambda folder: edit_config(folder, hidden_size="many"), "cannot be loaded"),
        (lambda folder: edit_config(folder, num_attention_heads=0), "cannot be loaded"),
        (lambda folder: edit_config(folder, model_type="unheard-of"), "cannot be loaded"),
        (lambda folder: edit_config(folder, model_type="vit"), "cannot be loaded"),
        (lambda folder: edit_config(folder, model_type=3), "cannot be loaded"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(
    base: Path, refused: Callable[..., str], damage: Callable[[Path], Any], words: str
) -> None:
    damage(base)
    line = refused()
    assert words in line
    assert str(base) in line


def test_what_an_offer_names_is_what_peft_matches() -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    path = "model.language_model.layers.3.self_attn.q_proj"
    for targets in (["q_proj"], ["attn.q_proj"], [path], r".*language_model\..*\.(q_proj|k_proj)"):
        found = check_target_module_exists(LoraConfig(target_modules=targets), path)
        assert bool(found) is is_target(targets, path)
