"""Small decoders of transformers with PEFT layers, and the usual padded step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm.packing.attention import PARTS_ATTENTION

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
WINDOW = {"sliding_window": 5, "head_dim": 8}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 4}),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, linear rotary scaling": ("llama", {"rope_scaling": LINEAR}),
    "llama, llama3 rotary scaling": ("llama", {"rope_scaling": LLAMA3}),
    "llama, yarn rotary scaling": ("llama", {"rope_scaling": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in a layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "mistral, windows": ("mistral", WINDOW),
    "gemma3, windows": ("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
}


@dataclass(frozen=True)
class Row:
    """A row of tokens."""

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: Sequence[int] = ()


def make_decoder(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """Return a model that trains LoRA factors, with attention far from uniform."""
    kind, extra = DECODERS[name]
    config = AutoConfig.for_model(kind, **{**SIZES, **extra, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        model.requires_grad_(False)
        leaves = {path.rpartition(".")[2] for path, module in linears(model) if path}
        targets = sorted(leaves - {"lm_head", "embed_out"})
        inject_adapter_in_model(
            LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False),
            model,
            "c0",
        )
        model.to(dtype)
        for path, parameter in model.named_parameters():
            # at the usual start attention is near uniform, and wrong positions hardly show
            if parameter.ndim == 2 and "lora" not in path:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model.train()


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear modules with their paths."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]


def in_layout(model: nn.Module, layout: str) -> nn.Module:
    """Return the model with the attention that a layout needs."""
    model.set_attn_implementation(PARTS_ATTENTION if layout == "parts" else "sdpa")  # type: ignore[operator]
    return model


def plain_loss(
    model: nn.Module, rows: Sequence[Row], *, side: str = "right", loss_on: str = "answer"
) -> Tensor:
    """Return the mean loss of padded rows, with all logits, as in the usual training loop."""
    texts = [row.prompt_ids + row.answer_ids for row in rows]
    width = max(map(len, texts))
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    labels: list[list[int]] = []
    for row, text in zip(rows, texts, strict=True):
        gap = width - len(text)
        first = max(1, len(row.prompt_ids)) if loss_on == "answer" else 1
        labels_T = [-100] * first + text[first:]
        for place in row.prompt_targets:
            labels_T[place] = text[place]
        lists = (text, [1] * len(text), labels_T)
        for where, values, filler in zip((ids, mask, labels), lists, (0, 0, -100), strict=True):
            filling = [filler] * gap
            where.append(filling + values if side == "left" else values + filling)
    mask_NT = torch.tensor(mask)
    logits = model(
        input_ids=torch.tensor(ids),
        attention_mask=mask_NT,
        position_ids=(mask_NT.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
    ).logits[:, :-1]
    targets = torch.tensor(labels)[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return a loss and the gradient of every LoRA factor."""
    factors = {path: p for path, p in model.named_parameters() if p.requires_grad}
    for parameter in factors.values():
        parameter.grad = None
    value = loss()
    value.backward()
    found = {path: p.grad.clone() for path, p in factors.items() if p.grad is not None}
    assert len(found) == len(factors), "a factor without a gradient"
    return value.item(), found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error of a gradient, relative to that gradient's largest entry."""
    return max(
        ((found[path] - e).abs().max() / e.abs().max()).item() for path, e in expected.items()
    )


class AllLogits(nn.Module):
    """A model that always computes all logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        use_cache: bool,
        **options: object,
    ) -> object:
        return self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **options,
        )
