"""A base is found, described and loaded from its directory, or refused with what was found."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PretrainedConfig,
)

from fedllm.config.models import LoraSection, ModelSection
from fedllm.errors import ModelError
from fedllm.model.base import (
    describe_base,
    load_base,
    load_tokenizer,
    locate_base,
)
from fedllm.model.fingerprint import fingerprint_model, fingerprint_tokenizer
from fedllm.model.targets import find_modules
from fedllm.storage.hub import hub_key
from fedllm.storage.paths import CachePaths
from tests.tiny import Tiny

TARGETS = LoraSection().target_modules


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """Return a copy of the small base that a test may damage."""
    return Path(shutil.copytree(tiny.model, tmp_path / "base"))


def of_shape(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as raised:
        load_base(folder, dtype="float32", device="cpu")
    message = str(raised.value)
    assert message.startswith(f"model.path: {folder}")
    assert "\n" not in message
    return message


def test_description_and_loaded_base_agree(tiny: Tiny) -> None:
    described = describe_base(tiny.model, TARGETS)
    loaded = load_base(tiny.model, dtype="float32", device="cpu")
    assert described.fingerprint == loaded.fingerprint
    assert described.modules == find_modules(loaded.model, TARGETS) == loaded.modules
    assert described.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert not any(p.requires_grad for p in loaded.model.parameters())
    key = described.modules["model.layers.1.self_attn.k_proj"]
    assert (key.out_features, key.in_features, key.kind) == (16, 32, "attention")
    assert described.modules["model.layers.0.mlp.down_proj"].kind == "mlp"


def test_the_output_head_is_not_adapted(tiny: Tiny) -> None:
    assert "lm_head" not in load_base(tiny.model, dtype="float32", device="cpu").modules


def test_a_base_is_loaded_in_bfloat16(tiny: Tiny) -> None:
    model = load_base(tiny.model, dtype="bfloat16", device="cpu").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_nano_base_is_described(shared: Path) -> None:
    described = describe_base(shared / "models" / "nano-base", TARGETS)
    assert len(described.modules) == 42
    assert 6_400_000 < described.parameters < 6_600_000


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (
            OPTConfig(num_hidden_layers=1, hidden_size=32, ffn_dim=64, num_attention_heads=4),
            {"q_proj": "attention", "out_proj": "attention", "fc1": "mlp", "fc2": "mlp"},
        ),
        (
            GPTNeoXConfig(
                num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=4
            ),
            {"query_key_value": "attention", "dense": "attention", "dense_h_to_4h": "mlp"},
        ),
        (
            FalconConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4),
            {"query_key_value": "attention", "dense_4h_to_h": "mlp"},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_of_other_families_have_their_kind(
    config: PretrainedConfig, kinds: dict[str, str]
) -> None:
    found = find_modules(of_shape(config), list(kinds))
    assert {path.rpartition(".")[2]: module.kind for path, module in found.items()} == kinds


def test_a_full_path_names_one_module(tiny: Tiny) -> None:
    model = load_base(tiny.model, dtype="float32", device="cpu").model
    path = "model.layers.0.self_attn.q_proj"
    assert list(find_modules(model, [path])) == [path]
    assert len(find_modules(model, ["self_attn.q_proj"])) == 2


def test_a_missing_module_is_named_with_the_existing_ones(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match=r"no module `query`; it has q_proj, k_proj"):
        describe_base(tiny.model, ["q_proj", "query"])


def test_weights_that_are_stored_transposed_are_known_by_what_they_compute() -> None:
    model = of_shape(GPT2Config(n_layer=1, n_embd=32, n_head=4))
    (found,) = find_modules(model, ["c_attn"]).values()
    assert (found.in_features, found.out_features, found.transposed) == (32, 96, True)


def test_a_module_that_is_not_linear_is_named_with_the_linear_ones() -> None:
    model = of_shape(GPT2Config(n_layer=1, n_embd=32, n_head=4))
    with pytest.raises(ModelError, match=r"`wte` of .* is a Embedding, .*\[c_attn, c_proj, c_fc\]"):
        find_modules(model, ["wte"])


def test_the_fingerprint_follows_the_content(folder: Path, tiny: Tiny) -> None:
    before, tokenizer = fingerprint_model(folder), fingerprint_tokenizer(folder)
    assert (before, tokenizer) == (
        fingerprint_model(tiny.model),
        fingerprint_tokenizer(tiny.model),
    )
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_model(folder) != before
    assert fingerprint_tokenizer(folder) == tokenizer
    (folder / "tokenizer_config.json").write_text("{}")
    assert fingerprint_tokenizer(folder) != tokenizer


def test_the_fingerprint_is_of_the_files_that_are_loaded(folder: Path) -> None:
    before = fingerprint_model(folder)
    save_file({"x": torch.zeros(1)}, folder / "junk.safetensors")
    assert fingerprint_model(folder) == before
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {
        "weight_map": dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors")
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    indexed = fingerprint_model(folder)
    weights = load_file(folder / "part.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "part.safetensors", metadata={"format": "pt"})
    assert len({before, indexed, fingerprint_model(folder)}) == 3


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "sub/a"])
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names {name}, which is not a file of" in refusal(folder)


def test_pickled_weights_are_loaded_after_the_offered_command(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    save_file({"x": torch.zeros(1)}, folder / "junk.safetensors")
    message = refusal(folder)
    words = shlex.split(message[message.index("python -c") :])
    command = [sys.executable, *words[1:]]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, capture_output=True)
    loaded = load_base(tmp_path / "NEW", dtype="float32", device="cpu").model.state_dict()
    assert torch.equal(loaded["model.norm.weight"], weights["model.norm.weight"])


def test_a_folder_without_weights_says_what_it_holds(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "no weights" in message
    assert "tokenizer.json" in message


def test_an_adapter_is_not_taken_for_a_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "PEFT adapter" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "it is cut short or no safetensors file" in refusal(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_a_configuration_of_no_known_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    assert "cannot be loaded" in refusal(folder)


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        fingerprint_tokenizer(folder)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["./nowhere", "no/such/place", "/nowhere", "someone/nothing"])
def test_a_missing_model_is_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    cache = CachePaths(root=tmp_path)
    with pytest.raises(ModelError, match=r"model\.path: .*no such directory") as raised:
        locate_base(ModelSection(path=name), cache, lambda _line: None)
    assert "\n" not in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_was_fetched_from_the_hub_needs_no_network_again(tiny: Tiny, tmp_path: Path) -> None:
    cache = CachePaths(root=tmp_path)
    fetched = shutil.copytree(tiny.model, cache.model(hub_key("someone/base", "v1")))
    section = ModelSection(path="someone/base", revision="v1")
    assert locate_base(section, cache, lambda _line: None) == fetched


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_read_later_are_those_that_are_read_at_once(
    tiny: Tiny, dtype: str
) -> None:
    whole = load_base(tiny.model, dtype=dtype, device="cpu").model.state_dict()
    base = load_base(tiny.model, dtype=dtype, device="cpu", to_divide=True)
    assert base.unread is not None
    for weight in base.model.parameters():
        assert weight.isnan().all()
        assert weight.untyped_storage().nbytes() <= 4
    names = {id(weight): name for name, weight in base.model.named_parameters()}
    for weight in base.unread.take(base.model, torch.device("cpu")):
        expected = whole.pop(names[id(weight)])
        assert weight.dtype == expected.dtype
        assert torch.equal(weight, expected)
    assert not base.unread.stored
    assert set(whole) == {"lm_head.weight"}  # tied
