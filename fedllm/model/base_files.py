"""Checks of a model directory's files, by configuration and headers; no weight is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedllm.errors import ModelError
from fedllm.model.fingerprint import check_model_folder
from fedllm.model.weight_files import read_json, weight_shards
from fedllm.storage.hub import first_line

_PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}
# Files in which programs that quantise say so, beside config.json.
_QUANTISED_FILES: Mapping[str, str] = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
_POINTER = b"version https://git-lfs"


def check_base_files(folder: Path) -> None:
    """Raise ModelError if files of a model directory are damaged or hold quantised weights.

    Raises:
        ModelError: names the file, what was found and what to give instead.
    """
    check_model_folder(folder)
    raw = read_json(folder / "config.json")
    if kind := _quantised(folder, raw):
        raise _is_quantised(folder, kind)
    for file in weight_shards(folder):
        _check_shard(folder, file)


def check_shapes(folder: Path, model: torch.nn.Module) -> None:
    """Raise ModelError if a stored weight has not the size that `model` has by config.json.

    Raises:
        ModelError: names the first tensor with more or fewer numbers.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in weight_shards(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                stored = tuple(tensors.get_slice(name).get_shape())
                shape = expected.get(name, stored)
                # counts, not shapes: a tensor may be stored transposed
                if torch.Size(stored).numel() != torch.Size(shape).numel():
                    raise ModelError(
                        f"model.path: {file}: {name} is {_by(stored)}, by config.json it is "
                        f"{_by(shape)}; the two files are of different models: copy both again"
                    )


def _quantised(folder: Path, raw: Mapping[str, Any]) -> str:
    """Return the kind of quantisation that a directory names; empty if it names none."""
    sections = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    for section in sections:
        for key in ("quantization_config", "compression_config"):
            if isinstance(settings := section.get(key), dict):
                named = settings.get("quant_method") or settings.get("quant_algo")
                return str(named or ("bitsandbytes" if _in_bits(settings) else key))
    return next((k for name, k in _QUANTISED_FILES.items() if (folder / name).is_file()), "")


def _in_bits(section: Mapping[str, Any]) -> bool:
    return bool(section.get("load_in_4bit") or section.get("load_in_8bit"))


def _is_quantised(folder: Path, kind: str) -> ModelError:
    return ModelError(
        f"model.path: {folder} is quantised ({kind}); adapters are trained on whole weights here: "
        "give the directory of the model that is not quantised (float32, bfloat16 or float16), "
        "which model.quantization can quantise"
    )


def _check_shard(folder: Path, file: Path) -> None:
    with file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            raise ModelError(
                f"model.path: {file} is a Git LFS pointer, not the weights; run `git lfs pull` "
                f"in {folder}"
            )
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                dtype = tensors.get_slice(name).get_dtype()
                if "weight" in name.rpartition(".")[2] and dtype not in _PLAIN_DTYPES:
                    raise _is_quantised(folder, f"{name} holds {dtype}")
    except SafetensorError as error:
        raise ModelError(
            f"model.path: {file} cannot be read ({first_line(error)}); it is cut short or no "
            "safetensors file: copy it again"
        ) from error


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
