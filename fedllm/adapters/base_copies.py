"""Copies of base weights that PEFT saves with an adapter, compared with the base.

If `lm_head` or the embedding is a target, or the vocabulary was resized, PEFT adds the weights of
both to the adapter's file. An unchanged copy is left out. A changed copy is more than LoRA.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedllm.adapters.peft_files import PeftAdapter
from fedllm.adapters.tensor_names import place_of
from fedllm.errors import AdapterError
from fedllm.model.weight_files import weight_shards
from fedllm.storage.tensors import TensorFile

_EMBEDDINGS = ("embed", "wte")  # parts of the name of a weight that a tied head shares
_SAVE = "save the adapter with save_embedding_layers=False"
# training in half precision rounds the base
_ROUNDED = (torch.bfloat16, torch.float16)


def check_copies(adapters: Sequence[PeftAdapter], base: Path | None) -> None:
    """Raise AdapterError if a copy of a base weight differs from the base.

    Args:
        adapters: the adapters whose copies are compared.
        base: the folder of the base; None: the copies are compared with each other.

    Raises:
        AdapterError: a copy differs, or nothing is there to compare it with.
    """
    files = list(_weights(base)) if base else []
    first: dict[str, tuple[Path, Tensor]] = {}
    for adapter in adapters:
        for key in adapter.factors.copies:
            copied = adapter.factors.copied(key)
            if files:
                if not any(_same(copied, weight) for weight in _candidates(files, key, copied)):
                    raise _changed(adapter, key, f"the base in {base}")
                continue
            if ".base_layer." not in adapter.factors.copies[key]:
                raise AdapterError(
                    f"{adapter.folder}: {adapter.factors.copies[key]} is a whole weight, and "
                    "the base is not here to compare it with; say where it is (--base PATH), or "
                    f"{_SAVE}"
                )
            folder, other = first.setdefault(place_of(key), (adapter.folder, copied))
            if copied.shape != other.shape or not _same(copied, other):
                raise _changed(adapter, key, f"that of {folder}")


def _changed(adapter: PeftAdapter, key: str, than: str) -> AdapterError:
    return AdapterError(
        f"{adapter.folder}: {adapter.factors.copies[key]} differs from {than}, so more than LoRA "
        f"would be needed; where only LoRA was trained, {_SAVE}"
    )


def _weights(base: Path) -> Iterator[TensorFile]:
    return (TensorFile(path) for path in weight_shards(base))


def _candidates(files: Iterable[TensorFile], key: str, copied: Tensor) -> Iterator[Tensor]:
    """Yield the weights of that name; for a head without one, the embeddings that it may share."""
    owner, _, kind = key.rpartition(".")
    fitting = [
        (file, name)
        for file in files
        for name in file.names
        if name.rpartition(".")[2] == kind and file.shape(name) == tuple(copied.shape)
    ]
    named = [
        (file, name)
        for file, name in fitting
        if place_of(name.rpartition(".")[0]) == place_of(owner)
    ]
    if not named and owner.endswith("lm_head"):
        named = [(f, name) for f, name in fitting if any(word in name for word in _EMBEDDINGS)]
    yield from (file.get(name) for file, name in named)


def _same(copied: Tensor, weight: Tensor) -> bool:
    candidates = (weight.to(dtype) for dtype in (copied.dtype, *_ROUNDED))
    return any(torch.equal(copied, rounded.to(copied.dtype)) for rounded in candidates)
