"""Adapters combined in memory: PEFT in, PEFT out."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedllm.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor

    from fedllm.server.combine import Combined, RequestedRank

    AdapterLike: TypeAlias = str | Path | PeftModel | tuple[LoraConfig, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class CombinedAdapter:
    """An adapter as PEFT has it: its configuration, and its tensors by PEFT's names.

    `report` has the rank, energy kept and error bound of every module.
    """

    config: "LoraConfig"
    tensors: "Mapping[str, Tensor]"
    report: "Combined"

    def save(self, folder: str | Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads."""
        from safetensors.torch import save_file

        from fedllm.adapters.peft_files import TENSORS

        self.config.save_pretrained(str(folder))
        save_file(dict(self.tensors), Path(folder) / TENSORS)

    def on(self, base: Any) -> "PeftModel":
        """Return a base model with this adapter on it; the base is changed in place, as by PEFT."""
        from peft import get_peft_model, set_peft_model_state_dict

        model = get_peft_model(base, self.config)
        set_peft_model_state_dict(model, dict(self.tensors))
        return model


def aggregate(
    adapters: "Sequence[AdapterLike]",
    *,
    rank: "RequestedRank" = None,
    weights: Sequence[float] | None = None,
    method: str = "flexlora",
    device: str = "auto",
    dtype: str = "float32",
    exact: bool = False,
    tolerance: float = 1e-4,
    base: str | None = None,
    allow_missing: bool = False,
) -> CombinedAdapter:
    """Return the weighted mean of adapters of any ranks, as one adapter.

    Args:
        adapters: PEFT folders, PEFT models, or pairs of a `LoraConfig` and tensors by PEFT's names
            (`get_peft_model_state_dict`).
        rank: rank of the result; `"full"`: nothing is lost; None: the largest of each module.
        weights: one per adapter, not normalised; None: all equal.
        method: the method that combines them.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `float32`, `bfloat16` or `float16`, of the result.
        exact: use direct decompositions in float64 only.
        tolerance: how much the lost energy may exceed the least possible, relative to it.
        base: name of the base model, if the adapters name it differently.
        allow_missing: combine even if most modules are missing in some adapters.

    Raises:
        AdapterError: adapters that cannot be read or combined.
    """
    from fedllm.server.combine import CombineRequest, WeightedAdapter, combine_adapters

    shares = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(shares) != len(adapters):
        raise AdapterError(f"got {len(adapters)} adapters and {len(shares)} weights; need as many")
    with tempfile.TemporaryDirectory(prefix="fedllm-") as scratch:
        folders = [_folder_of(each, Path(scratch) / str(n)) for n, each in enumerate(adapters)]
        out = Path(scratch) / "out"
        report = combine_adapters(
            CombineRequest(
                adapters=[
                    WeightedAdapter(folder=folder, weight=weight)
                    for folder, weight in zip(folders, shares, strict=True)
                ],
                out=out,
                rank=rank,
                method=method,
                device=device,
                dtype=dtype,
                exact=exact,
                tolerance=tolerance,
                base=base,
                allow_missing=allow_missing,
            )
        )
        return _read(out, report)


def _folder_of(adapter: "AdapterLike", scratch: Path) -> Path:
    """Return the folder of an adapter; one in memory is written to `scratch`."""
    if isinstance(adapter, str | Path):
        return Path(adapter)
    if isinstance(adapter, tuple):
        from safetensors.torch import save_file

        from fedllm.adapters.peft_files import TENSORS

        config, tensors = adapter
        config.save_pretrained(str(scratch))
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, scratch / TENSORS)
        return scratch
    adapter.save_pretrained(str(scratch))
    return scratch


def _read(folder: Path, report: "Combined") -> CombinedAdapter:
    from peft import LoraConfig
    from safetensors.torch import load_file

    from fedllm.adapters.peft_files import TENSORS

    config = LoraConfig.from_pretrained(str(folder))
    return CombinedAdapter(config=config, tensors=load_file(folder / TENSORS), report=report)
