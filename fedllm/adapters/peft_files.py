"""PEFT adapter folders, read without PEFT and without unpickling anything.

PEFT stores A as (R, I) and B as (O, R), also for a base weight that is stored transposed:
`fan_in_fan_out` (the Conv1D of GPT-2) transposes the product, not the factors.

Legend: O out, I in, R rank.
"""

import shlex
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fedllm.adapters.peft_config import (
    CONFIG,
    AdapterConfig,
    read_adapter_config,
    refuse_pointer,
)
from fedllm.adapters.tensor_names import base_key, factor_key, place_of
from fedllm.errors import AdapterError, RunDirectoryError
from fedllm.lora.factors import Factors, ModuleShape
from fedllm.storage.tensors import TensorFile

TENSORS = "adapter_model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Value = TypeVar("Value")

_PICKLED = "adapter_model.bin"
_PARTS = "adapter_model-*-of-[0-9]*.safetensors"
# Commands that error messages give; the folder is their argument.
_CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; f = sys.argv[1]; "
    f'save_file({{n: t.contiguous().clone() for n, t in torch.load(f + "/{_PICKLED}", '
    f'map_location="cpu", weights_only=True).items()}}, f + "/{TENSORS}")'
)
_JOIN = (
    "import sys, glob; from safetensors.torch import load_file, save_file; f = sys.argv[1]; "
    f'save_file({{n: t for p in glob.glob(glob.escape(f) + "/{_PARTS}") '
    f'for n, t in load_file(p).items()}}, f + "/{TENSORS}")'
)
_READABLE = (*DTYPES.values(), torch.float64)
# Parts of a tensor's name -> its kind; the first that the name has counts.
_OTHER_TENSORS: Mapping[str, str] = {
    "lora_embedding": "embedding LoRA",
    "lora_magnitude_vector": "DoRA",
    "trainable_tokens": "trainable tokens",
    "token_adapter": "trainable tokens",
    "modules_to_save": "modules_to_save (whole layers)",
    ".bias": "a trained bias",
}


def dtype_of(name: str) -> torch.dtype:
    """Return the number format that `--dtype` names.

    Raises:
        AdapterError: there is no such format.
    """
    if name not in DTYPES:
        raise AdapterError(f"--dtype: got {name!r}, need one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A PEFT adapter folder; its factors are read when they are used."""

    folder: Path
    config: AdapterConfig
    factors: "FactorsOnDisk"

    @property
    def base_model(self) -> str | None:
        """The base model that the adapter names; None if it names none."""
        return self.config.base_model_name_or_path or None


class FactorsOnDisk(Mapping[str, Factors]):
    """Factors per module, each read from a memory-mapped file when it is used.

    Shapes and ranks come from the header. Factors are float32 (float64 if the file has it), so
    that no sum is in half precision. `copies` are weights of the base that the file also has: the
    base's name -> the name in the file.

    Raises:
        AdapterError: a tensor is no A or B, a module has two of them or A without B, or shapes do
            not fit each other or the configuration.
    """

    def __init__(self, file: TensorFile, config: AdapterConfig) -> None:
        self._file = file
        self._names = _factor_names(file)
        self.copies: Mapping[str, str] = {
            key: name for name in file.names if (key := base_key(name)) and not factor_key(name)
        }
        self._ranks = {module: config.rank(module) for module in self._names}
        self._scales = {module: config.scale(module) for module in self._names}
        self._shapes = {module: self._checked_shape(module) for module in self._names}

    def __getitem__(self, module: str) -> Factors:
        """Read the factors of one module.

        Raises:
            KeyError: the adapter has no such module.
            AdapterError: a factor holds NaN or infinity, or has a wrong number format.
        """
        names = self._names[module]
        return Factors(
            a_RI=self._read(names["A"]),
            b_OR=self._read(names["B"]),
            scale=self.scale(module),
        )

    def __contains__(self, module: object) -> bool:
        # the method of Mapping would read the factors
        return module in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, module: str) -> ModuleShape:
        """Return the shape of the module's weight; the factors are not read."""
        return self._shapes[module]

    def rank(self, module: str) -> int:
        """Return the module's rank; the factors are not read."""
        return self._ranks[module]

    def scale(self, module: str) -> float:
        """Return the scale of the module's product."""
        return self._scales[module]

    def named(self, names: Mapping[str, str]) -> "FactorsOnDisk":
        """Return the same factors with new module names; `names` maps old to new ones."""
        other = copy(self)
        other._names = _renamed(self._names, names)
        other._ranks = _renamed(self._ranks, names)
        other._scales = _renamed(self._scales, names)
        other._shapes = _renamed(self._shapes, names)
        return other

    def copied(self, key: str) -> Tensor:
        """Read one copy of a base weight, by a key of `copies`."""
        return self._file.get(self.copies[key])

    def views(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and B (O, R) as views of the file; nothing is read or checked yet."""
        names = self._names[module]
        return self._file.get(names["A"]), self._file.get(names["B"])

    def name(self, module: str, part: str) -> str:
        """Return the name of `A` or `B` of a module in messages: the folder and the tensor."""
        return f"{self._file.path.parent}: {self._names[module][part]}"

    def _checked_shape(self, module: str) -> ModuleShape:
        names, where = self._names[module], self._file.path.parent
        for part in "AB":
            if part not in names:
                raise AdapterError(f"{where}: {module} has no lora_{part}; save the adapter again")
        a, b = self._file.shape(names["A"]), self._file.shape(names["B"])
        if min(len(a), len(b)) < 2 or 0 in (*a, *b):
            raise AdapterError(
                f"{where}: {module}: lora_A is {a} and lora_B {b}: saved without gathering its "
                "parameters (ZeRO-3, FSDP); gather them, then save the adapter again"
            )
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterError(
                f"{where}: {module}: lora_A is {a} and lora_B {b}, need (rank, in) and (out, rank)"
            )
        if a[0] != self.rank(module):
            raise AdapterError(
                f"{where}: {module}: {CONFIG} gives it rank {self.rank(module)}, "
                f"lora_A has rank {a[0]}; one of the two files belongs to another adapter"
            )
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
        AdapterError: the adapter is missing, corrupt, truncated or pickled, or more than LoRA.
    """
    config = read_adapter_config(folder)
    path = folder / TENSORS
    if not path.exists():
        raise AdapterError(_without_tensors(folder))
    try:
        refuse_pointer(path)
        file = TensorFile(path)
    except RunDirectoryError as error:
        raise AdapterError(f"{error}; copy the adapter again") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error}); check the file") from error
    return PeftAdapter(folder=folder, config=config, factors=FactorsOnDisk(file, config))


def _renamed(values: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    return {names.get(module, module): value for module, value in values.items()}


def _factor_names(file: TensorFile) -> dict[str, dict[str, str]]:
    names: dict[str, dict[str, str]] = {}
    places: dict[tuple[str, str], str] = {}
    for name in file.names:
        factor = factor_key(name)
        if factor is None:
            if base_key(name) is None:
                raise AdapterError(_other_tensor(file.path.parent, name))
            continue
        other = places.setdefault((place_of(factor.module), factor.part), name)
        if other != name:
            raise AdapterError(
                f"{file.path.parent}: {other} and {name} are both lora_{factor.part} of "
                f"{factor.module}; save one adapter, from the unwrapped model"
            )
        names.setdefault(factor.module, {})[factor.part] = name
    if not names:
        raise AdapterError(
            f"{file.path}: holds no lora_A and lora_B: nothing was trained; leave it out"
        )
    return names


def _other_tensor(folder: Path, name: str) -> str:
    kind = next((kind for part, kind in _OTHER_TENSORS.items() if part in name), None)
    problem = f"{name} is {kind}" if kind else f"{name} is no base_model.model.*.lora_A or lora_B"
    return f"{folder}: {problem}; only A and B of LoRA are combined"


def _without_tensors(folder: Path) -> str:
    if (folder / _PICKLED).exists():
        return (
            f"{folder}: holds {_PICKLED}, which is pickled and never read here; convert it: "
            f"python -c {shlex.quote(_CONVERT)} {shlex.quote(str(folder))}"
        )
    parts = sorted(path.name for path in folder.glob(_PARTS))
    if parts:
        num_parts = int(parts[0].rpartition("-")[2].removesuffix(".safetensors"))
        if len(parts) < num_parts:
            return (
                f"{folder}: {len(parts)} of {num_parts} parts are in it ({parts[0]}); copy the rest"
            )
        return (
            f"{folder}: its tensors are in {num_parts} parts ({parts[0]}, ...); join them: "
            f"python -c {shlex.quote(_JOIN)} {shlex.quote(str(folder))}"
        )
    return f"{folder}: no {TENSORS} in it; copy the adapter again"
