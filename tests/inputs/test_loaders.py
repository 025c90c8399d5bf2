"""A written adapter gives the same product in every program that loads it."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedllm.cli.main import run as fedllm
from fedllm.server.export import export_adapter, open_state
from tests.adapters.peft_folders import deltas, make_llama, save_adapter, weighted_mean
from tests.adapters.test_export import SCALINGS, expected, make_run
from tests.tiny import Tiny

Scale = Callable[[Mapping[str, Any], int], float]

# The configuration and a tensor's rank in, the scale of its product out.
FORMULAS: Mapping[str, Scale] = {
    # one for the whole adapter, from the configuration alone
    "vllm": lambda raw, _rank: (
        raw["lora_alpha"] / (math.sqrt(raw["r"]) if raw["use_rslora"] else raw["r"])
    ),
    # the tensor's own rank, whatever the configuration says of rsLoRA
    "llama.cpp": lambda raw, rank: raw["lora_alpha"] / rank,
}


def by_formula(folder: Path, scale: Scale) -> dict[str, Tensor]:
    raw = json.loads((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = scale(raw, a.shape[0]) * b.double() @ a.double()
    return found


def by_transformers(base: Path, folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(folder)
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n: m.get_delta_weight("default").detach().double() for n, m in layers.items()}


def everywhere(base: Path, folder: Path) -> list[dict[str, Tensor]]:
    formulas = [by_formula(folder, scale) for scale in FORMULAS.values()]
    return [deltas(base, folder), by_transformers(base, folder), *formulas]


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for module, change in wanted.items():
        assert float((found[module] - change).norm()) <= 1e-5 * float(change.norm()) + 1e-9, module


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rank", [None, 5])
def test_an_export_of_mixed_ranks_is_one_product_in_every_loader(
    tiny: Tiny, tmp_path: Path, scaling: str, rank: int | None
) -> None:
    run = make_run(tmp_path / "r", tiny, scaling=scaling)
    export_adapter(open_state(run, None), tmp_path / "out", rank=rank)
    wanted = expected(run, rank or 6)
    for found in everywhere(tiny.model, tmp_path / "out"):
        same(found, wanted)


def test_an_aggregate_of_mixed_ranks_is_one_product_in_every_loader(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    folders = [
        save_adapter(
            base,
            tmp_path / "a",
            seed=1,
            r=3,
            lora_alpha=5,
            rank_pattern={"v_proj": 1, "0.self_attn.q_proj": 6},
            alpha_pattern={"q_proj": 11},
        ),
        save_adapter(base, tmp_path / "b", seed=2, r=4, lora_alpha=3, use_rslora=True),
    ]
    out = tmp_path / "out"
    arguments = [*map(str, folders), "--out", str(out), "--rank", "full"]
    assert fedllm(["aggregate", *arguments]) == 0
    wanted = weighted_mean([deltas(base, folder) for folder in folders], [1.0, 1.0])
    for found in everywhere(base, out):
        same(found, wanted)
