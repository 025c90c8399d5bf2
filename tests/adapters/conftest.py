"""Fixtures: base models and one adapter of each kind that users have."""

from pathlib import Path

import pytest
import torch

from tests.adapters.peft_folders import make_gpt2, make_llama, save_adapter


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("gpt2") / "base")


@pytest.fixture(scope="session")
def zoo(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one Llama, in each form that can be combined."""
    root = tmp_path_factory.mktemp("zoo")
    mlp = ["q_proj", "v_proj", "gate_proj"]
    return {
        "plain": save_adapter(llama, root / "plain", seed=1, r=2, lora_alpha=16),
        "rslora": save_adapter(
            llama, root / "rslora", seed=2, r=4, lora_alpha=3, use_rslora=True, target_modules=mlp
        ),
        "patterns": save_adapter(
            llama,
            root / "patterns",
            seed=3,
            r=3,
            lora_alpha=5,
            target_modules=mlp,
            # a last part, an ending, a regular expression, a whole name
            rank_pattern={
                "v_proj": 1,
                "0.self_attn.q_proj": 5,
                r"layers\.[01]\.mlp\.gate_\w+": 6,
            },
            alpha_pattern={"^model.layers.1.self_attn.q_proj": 11, "mlp.gate_proj": 7},
        ),
        "regex": save_adapter(
            llama,
            root / "regex",
            seed=4,
            r=2,
            lora_alpha=2,
            use_rslora=True,
            target_modules=r"model\.layers\.1\.(self_attn\.k_proj|mlp\.down_proj)",
            alpha_pattern={"down_proj": 9},
        ),
        "bfloat16": save_adapter(llama, root / "bfloat16", seed=5, dtype=torch.bfloat16),
        "float16": save_adapter(llama, root / "float16", seed=6, r=8, dtype=torch.float16),
    }
