"""PEFT adapter folders, written so that every loader computes the same product.

PEFT scales a module's `B A` by the module's alpha over its rank, vLLM by the configuration's
`lora_alpha / r` for all modules, llama.cpp by that alpha over the tensor's rank. They agree if all
modules have one rank and one scale. So the rest of a module's scale goes into its B, and a module
of a smaller rank gets zero rows in A and zero columns in B.

Legend: O out, I in, R rank.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedllm.adapters.peft_config import CONFIG
from fedllm.adapters.peft_files import TENSORS
from fedllm.errors import AdapterError
from fedllm.lora.factors import Adapter, Factors, ModuleShape
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.tensors import TensorSpec, TensorWriter, writing_tensors

# alpha = 2r is a whole number, and halving B is exact
_SCALE = 2


@dataclass(frozen=True, kw_only=True)
class PeftDescription:
    """The fields of an adapter's configuration beside its rank and scale.

    `targets` has PEFT's fields that choose the modules (`target_modules` and so on).
    """

    base_model: str | None
    targets: Mapping[str, Any]
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    fan_in_fan_out: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PlannedModule:
    """A module of an adapter, to be written."""

    shape: ModuleShape
    rank: int


@dataclass(frozen=True, kw_only=True)
class PeftWriter:
    """A writer of an adapter's modules, in any order; all get the rank `rank`."""

    writer: TensorWriter
    dtype: torch.dtype
    rank: int

    def write(self, module: str, factors: Factors) -> None:
        """Write one module.

        Raises:
            AdapterError: a value does not fit `dtype`.
        """
        missing = self.rank - factors.rank
        scaled_OR = _scaled(factors)
        for part, factor in (
            ("A", pad(factors.a_RI, (0, 0, 0, missing))),
            ("B", pad(scaled_OR, (0, missing))),
        ):
            name = _tensor(module, part)
            tensor = factor.to("cpu", self.dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{name}: does not fit {self.dtype}; use float32")
            self.writer.write(name, tensor)


@contextmanager
def writing_peft_adapter(
    folder: Path,
    modules: Mapping[str, PlannedModule],
    *,
    about: PeftDescription,
    dtype: torch.dtype = torch.float32,
) -> Iterator[PeftWriter]:
    """Write an adapter folder for PEFT: the block writes the modules, the configuration is last.

    All modules get the largest of their ranks; smaller ones are padded with zeros.
    """
    assert modules, "an adapter without modules"
    rank = max(plan.rank for plan in modules.values())
    planned: dict[str, TensorSpec] = {}
    for module, plan in modules.items():
        planned[_tensor(module, "A")] = TensorSpec(shape=(rank, plan.shape.in_), dtype=dtype)
        planned[_tensor(module, "B")] = TensorSpec(shape=(plan.shape.out, rank), dtype=dtype)
    with writing_tensors(folder / TENSORS, planned, {"format": "pt"}) as writer:
        yield PeftWriter(writer=writer, dtype=dtype, rank=rank)
    content = json.dumps(_peft_fields(rank, about), indent=2, ensure_ascii=False)
    publish_bytes(folder / CONFIG, f"{content}\n".encode())


def write_peft_adapter(
    folder: Path, adapter: Adapter, *, about: PeftDescription, dtype: torch.dtype = torch.float32
) -> None:
    """Write an adapter in memory as a folder that PEFT loads.

    Raises:
        AdapterError: a value does not fit `dtype`.
    """
    modules = {
        module: PlannedModule(shape=factors.shape, rank=factors.rank)
        for module, factors in adapter.items()
    }
    with writing_peft_adapter(folder, modules, about=about, dtype=dtype) as writer:
        for module, factors in adapter.items():
            writer.write(module, factors)


def _scaled(factors: Factors) -> Tensor:
    """Return the B (O, R) that gives the same change at the common scale."""
    if factors.scale == _SCALE:
        return factors.b_OR
    return factors.b_OR.double() * (factors.scale / _SCALE)


def _tensor(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"


def _peft_fields(rank: int, about: PeftDescription) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": about.base_model,
        "revision": about.revision,
        "task_type": about.task_type,
        "auto_mapping": about.auto_mapping,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _SCALE * rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": about.dropout,
        "bias": "none",
        "fan_in_fan_out": about.fan_in_fan_out,
        "init_lora_weights": True,
        **about.targets,
    }
