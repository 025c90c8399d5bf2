"""PEFT adapter folders, read without PEFT and without unpickling anything.

PEFT stores A as (R, I) and B as (O, R) whatever the layout of the base weight: `fan_in_fan_out`
(the Conv1D of GPT-2) transposes the product, not the factors.

Legend: O out, I in, R rank.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedllm.errors import AdapterError, RunDirectoryError
from fedllm.lora.factors import Factors, ModuleShape
from fedllm.model.adapter_config import CONFIG, AdapterConfig, read_adapter_config
from fedllm.storage.tensors import TensorFile

TENSORS = "adapter_model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_PICKLED = "adapter_model.bin"
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_READABLE = (*DTYPES.values(), torch.float64)
# The first that a tensor's name holds says what it is.
_OTHER_TENSORS: Mapping[str, str] = {
    "lora_embedding": "embedding LoRA",
    "lora_magnitude_vector": "DoRA",
    "trainable_tokens": "trainable tokens",
    "token_adapter": "trainable tokens",
    "modules_to_save": "modules_to_save (whole layers)",
    ".bias": "a trained bias",
}


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A PEFT adapter folder whose factors are read when they are asked for."""

    folder: Path
    config: AdapterConfig
    factors: "FactorsOnDisk"

    @property
    def base_model(self) -> str | None:
        """The base model that the adapter was trained on, where it says so."""
        return self.config.base_model_name_or_path or None


class FactorsOnDisk(Mapping[str, Factors]):
    """Module -> factors, each read from a file by memory map when it is asked for.

    Shapes and ranks are known from the header alone. Factors come in float32 (float64 where the
    file has it), so that half precision enters no sum.

    Raises:
        AdapterError: a tensor that is no A or B, A without B, or shapes that do not fit together
            or the configuration.
    """

    def __init__(self, file: TensorFile, config: AdapterConfig) -> None:
        self._file = file
        self._config = config
        self._names = _factor_names(file)
        self._shapes = {module: self._checked_shape(module) for module in self._names}

    def __getitem__(self, module: str) -> Factors:
        """Read one module.

        Raises:
            KeyError: the adapter has no such module.
            AdapterError: NaN or infinity, or a number format that factors do not come in.
        """
        names = self._names[module]
        return Factors(
            a_RI=self._read(names["A"]),
            b_OR=self._read(names["B"]),
            scale=self.scale(module),
        )

    def __contains__(self, module: object) -> bool:
        # a mapping's own would read the factors
        return module in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, module: str) -> ModuleShape:
        """Return the shape of the module's weight without reading the factors."""
        return self._shapes[module]

    def rank(self, module: str) -> int:
        """Return the module's rank without reading the factors."""
        return self._config.rank(module)

    def scale(self, module: str) -> float:
        """Return the scale of the module's product."""
        return self._config.scale(module)

    def views(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R) as they lie in the file: nothing is read or checked yet."""
        names = self._names[module]
        return self._file.get(names["A"]), self._file.get(names["B"])

    def name(self, module: str, part: str) -> str:
        """Return how a message names `A` or `B` of a module: the folder and the tensor."""
        return f"{self._file.path.parent}: {self._names[module][part]}"

    def _checked_shape(self, module: str) -> ModuleShape:
        names, where = self._names[module], self._file.path.parent
        for part in "AB":
            if part not in names:
                raise AdapterError(f"{where}: {module} has no lora_{part}; save the adapter again")
        a, b = self._file.shape(names["A"]), self._file.shape(names["B"])
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterError(
                f"{where}: {module}: lora_A is {a} and lora_B {b}, need (rank, in) and (out, rank)"
            )
        if a[0] != self.rank(module):
            raise AdapterError(
                f"{where}: {module}: {CONFIG} gives it rank {self.rank(module)}, "
                f"lora_A has rank {a[0]}; one of the two files belongs to another adapter"
            )
        if 0 in (*a, *b):
            raise AdapterError(f"{where}: {module}: lora_A is {a} and lora_B {b}: nothing in it")
        return ModuleShape(out=b[0], in_=a[1])

    def _read(self, name: str) -> Tensor:
        tensor = self._file.get(name)
        if tensor.dtype not in _READABLE:
            raise AdapterError(
                f"{self._file.path.parent}: {name} holds {str(tensor.dtype).removeprefix('torch.')}"
                f", need {', '.join(DTYPES)} or float64"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{self._file.path.parent}: {name} holds NaN or infinity; leave this adapter out"
            )
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def read_peft_adapter(folder: Path) -> PeftAdapter:
    """Open a PEFT adapter folder: its configuration and the headers of its tensors are checked.

    Raises:
        AdapterError: it is missing, corrupt, truncated or pickled, or more than A and B.
    """
    config = read_adapter_config(folder)
    path = folder / TENSORS
    if not path.exists():
        raise AdapterError(_without_tensors(folder))
    try:
        file = TensorFile(path)
    except RunDirectoryError as error:
        raise AdapterError(f"{error}; copy the adapter again") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error}); check the file") from error
    return PeftAdapter(folder=folder, config=config, factors=FactorsOnDisk(file, config))


def _factor_names(file: TensorFile) -> dict[str, dict[str, str]]:
    names: dict[str, dict[str, str]] = {}
    for name in file.names:
        found = _FACTOR.fullmatch(name)
        if found is None:
            raise AdapterError(_other_tensor(file.path.parent, name))
        names.setdefault(found["module"], {})[found["part"]] = name
    if not names:
        raise AdapterError(f"{file.path}: holds no lora_A and lora_B: nothing was trained")
    return names


def _other_tensor(folder: Path, name: str) -> str:
    what = next((what for part, what in _OTHER_TENSORS.items() if part in name), None)
    said = f"{name} is {what}" if what else f"{name} is no base_model.model.*.lora_A or lora_B"
    return f"{folder}: {said}; only A and B of LoRA are combined"


def _without_tensors(folder: Path) -> str:
    if (folder / _PICKLED).exists():
        return (
            f"{folder}: holds {_PICKLED}, which is pickled and never read here; "
            f"load it with PEFT where you trust it and save it as {TENSORS}"
        )
    return f"{folder}: no {TENSORS} in it; copy the adapter again"
