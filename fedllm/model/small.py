"""Small models of a base's class and configuration, with random weights, for measuring.

A class that cannot be made small gets a model of the configured size. No weight of the base is
read.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

_LAYERS = 8  # for classes that do not list their kinds of layers
_MAX_PARAMETERS = 1 << 23
_MAX_PARAMETERS_WHOLE = 1 << 26
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "window_size",
    "keep_window_size",
    "index_topk",
)
_SMALL_WINDOW = 5
_SMALL: Mapping[str, int] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "rotary_dim": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "vocab_size": 128,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
}


@contextmanager
def silence() -> Iterator[None]:
    """Suppress the warnings of transformers about a model that is only measured."""
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        set_verbosity(verbosity)


def small_model(config: Any, cutoff_tokens: int) -> nn.Module:
    """Return a small model in float64 with the masks and positions of the configuration.

    A window shorter than `cutoff_tokens` becomes shorter than the rows of the check; with 0 all
    windows keep their lengths.

    Raises:
        ValueError: the model is still large. The class may raise other errors for these sizes.
    """
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        _make_small(part, cutoff_tokens)
    return _random_model(config, _MAX_PARAMETERS)


def whole_model(config: Any) -> nn.Module:
    """Return a model in float64 of the configured sizes, with random weights.

    Raises:
        ValueError: the model is large.
    """
    return _random_model(copy.deepcopy(config), _MAX_PARAMETERS_WHOLE)


def _random_model(config: Any, max_parameters: int) -> nn.Module:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    size = sum(p.numel() for p in empty.parameters())
    if size > max_parameters:
        raise ValueError(f"{size:,} parameters remain")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # fused experts do not support float64
        model: nn.Module = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float64,
            experts_implementation="eager",
            trust_remote_code=False,
        )
        for parameter in model.parameters():
            # spread as after training: with small initial weights attention hardly depends on
            # positions, so that wrong ones would not show
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model.double().eval()


def _make_small(config: Any, cutoff_tokens: int) -> None:
    heads, shared = (integer(config, f"num_{n}_heads") for n in ("attention", "key_value"))
    layers = integer(config, "num_hidden_layers")
    for name, size in _SMALL.items():
        derived = isinstance(getattr(type(config), name, None), property)
        if integer(config, name) is not None and not derived:
            setattr(config, name, size)
    if heads and shared:
        config.num_key_value_heads = 4 // min(4, heads // shared)
    if layers:
        _keep_layers(config, layers)
    for name in _WINDOWS:
        if (window := integer(config, name)) is not None and window < cutoff_tokens:
            setattr(config, name, _SMALL_WINDOW)
    _fit_rotaries(config)
    _fit_token_ids(config)


def _fit_token_ids(config: Any) -> None:
    """Set special tokens beyond the small vocabulary to 0, which no row has."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if any(token is not None and token >= _SMALL["vocab_size"] for token in ids):
            setattr(config, name, 0)


def _fit_rotaries(config: Any) -> None:
    """Shorten lists with a value per rotary frequency to the size of the small heads."""
    for rotary in rotaries(config):
        frequencies = int(_SMALL["head_dim"] * rotary.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if name in rotary:
                rotary[name] = rotary[name][:frequencies]


def _keep_layers(config: Any, layers: int) -> None:
    """Keep one layer of each kind, at least two; the first layers if no kinds are listed."""
    kinds = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == layers
    }
    described = list(zip(*kinds.values(), strict=True)) or [()] * layers
    firsts = sorted({described.index(kind) for kind in described})
    kept = firsts if len(firsts) > 1 else list(range(min(2 if kinds else _LAYERS, layers)))
    for name, value in kinds.items():
        setattr(config, name, [value[layer] for layer in kept])
    config.num_hidden_layers = len(kept)


def integer(config: Any, name: str) -> int | None:
    """Return an integer of a configuration; None if it has none of that name."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def rotaries(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters: one set, or one per kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from filter(None, parameters.values())
