"""Adapters that together exceed the memory are combined."""

from pathlib import Path

import pytest
import torch

from fedllm.adapters.peft_writer import PeftDescription, write_peft_adapter
from fedllm.lora.factors import Factors
from tests.anonymous import peak_bytes

SIDE, RANK, MODULES, ADAPTERS = 512, 100, 24, 64


def save(folder: Path, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    adapter = {
        f"layers.{number}.q_proj": Factors(
            a_RI=torch.randn(RANK, SIDE, generator=draws),
            b_OR=torch.randn(SIDE, RANK, generator=draws),
            scale=2.0,
        )
        for number in range(MODULES)
    }
    folder.mkdir()
    about = PeftDescription(base_model="base", targets={"target_modules": ["q_proj"]})
    write_peft_adapter(folder, adapter, about=about)


@pytest.mark.slow
def test_the_peak_is_a_few_modules_and_not_all_adapters(tmp_path: Path) -> None:
    for number in range(ADAPTERS):
        save(tmp_path / f"adapter-{number}", number)
    out = tmp_path / "out"
    total = sum(path.stat().st_size for path in tmp_path.glob("*/*.safetensors"))
    peak = peak_bytes(
        "import torch; "
        "from fedllm.server.combine import CombineRequest, WeightedAdapter, combine_adapters",
        f"folders = sorted(Path({str(tmp_path)!r}).iterdir()); "
        "adapters = [WeightedAdapter(folder=folder, weight=1.0) for folder in folders]; "
        # module by module: these are far smaller than those that the working set is meant for
        f"combine_adapters(CombineRequest(adapters=adapters, out=Path({str(out)!r}), rank=64, "
        "working_bytes=1))",
    )
    assert (out / "adapter_config.json").exists()
    assert total >= 600 << 20
    assert peak < 160 << 20, f"{peak >> 20} MiB of {total >> 20}"
