"""Adapter folders made and read by PEFT, on base models of two layers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

torch.set_num_threads(1)


def make_llama(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kind: Any = AutoModelForCausalLM,
    **settings: Any,
) -> Path:
    """Save an adapter as PEFT does after training: A and B are not zero."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(kind.from_pretrained(base), config)
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, generator=draws)
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder))
    return folder


def deltas(base: Path, folder: Path, *, kind: Any = AutoModelForCausalLM) -> dict[str, Tensor]:
    """Return the changes that PEFT computes from an adapter folder, module -> (out, in)."""
    model = PeftModel.from_pretrained(kind.from_pretrained(base), folder)
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().double()
        turned = delta.mT if isinstance(layer.get_base_layer(), Conv1D) else delta
        found[name.removeprefix("base_model.model.")] = turned
    return found


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> Path:
    """Rename the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    return folder


def edit_config(folder: Path, **fields: object) -> Path:
    """Change fields of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))
    return folder


def unknown_keys(base: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Return the adapter keys that PEFT misses and those that it does not know."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear", r=1)
    )
    loaded = model.load_adapter(folder, "loaded")
    return [key for key in loaded.missing_keys if "loaded" in key], list(loaded.unexpected_keys)


def weighted_mean(changes: list[Mapping[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """Return the weighted mean of changes; a missing module counts as zero."""
    total = sum(weights)
    means: dict[str, Tensor] = {}
    for change, weight in zip(changes, weights, strict=True):
        for module, delta in change.items():
            means[module] = means.get(module, 0) + weight / total * delta
    return means
