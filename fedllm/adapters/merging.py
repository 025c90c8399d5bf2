"""Merging: changes added to the weights of a base model, and the model saved.

Legend: O out, I in.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fedllm.errors import ModelError
from fedllm.model.base import Base
from fedllm.model.saving import save_pretrained

_ERRNO = re.compile(r"os error (\d+)")


def plain_lines_in_a_log() -> None:
    """Switch off the progress bars of transformers if stderr is no terminal."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """The effect of rounding a merged change to the model's number format.

    `change` and `error` are squared Frobenius norms: of the change, and of the stored weights minus
    the exact sums. `entries` counts the entries that the change alters; `unchanged` of them keep
    the base's value after rounding.
    """

    change: float = 0.0
    error: float = 0.0
    unchanged: int = 0
    entries: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        """Return the rounding of both changes together."""
        return Rounding(
            change=self.change + other.change,
            error=self.error + other.error,
            unchanged=self.unchanged + other.unchanged,
            entries=self.entries + other.entries,
        )

    @property
    def survived(self) -> float:
        """The share of the change that is stored: 1 - |stored - exact| / |change|, at least 0."""
        return max(0.0, 1.0 - math.sqrt(self.error / self.change)) if self.change else 1.0

    @property
    def unchanged_share(self) -> float:
        """The share of altered entries whose stored value is the base's."""
        return self.unchanged / self.entries if self.entries else 0.0


def merge(
    model: nn.Module, module: str, change_OI: Tensor, *, dtype: torch.dtype | None = None
) -> Rounding:
    """Add a change (O, I) to the weight of `module` and store it in `dtype`.

    The sum is computed in float64 and rounded once to the nearest value, so that the error of each
    entry is minimal.

    Args:
        model: the model; its weight changes in place.
        module: the module's name.
        change_OI: the change.
        dtype: number format of the new weight; None keeps the old one.

    Raises:
        ModelError: another module has the same weight and would change too, or the sum does not
            fit `dtype`.
    """
    owner = model.get_submodule(module)
    weight = owner.get_parameter("weight")
    named = model.named_parameters(remove_duplicate=False)
    names = sorted(name for name, parameter in named if parameter is weight)
    if len(names) > 1:
        raise ModelError(
            f"{module}: one weight goes by the names {', '.join(names)}, merging would change all; "
            "export the adapter without --merge"
        )
    # a Conv1D keeps its weight (I, O)
    change = (change_OI.T if isinstance(owner, Conv1D) else change_OI).double()
    before = weight.data.double()
    exact = before + change
    stored = exact.to(dtype or weight.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise ModelError(f"{module}: its merged weight does not fit {stored.dtype}; use float32")
    weight.data = stored
    changing = change != 0
    return Rounding(
        change=float(change.square().sum()),
        error=float((stored.double() - exact).square().sum()),
        unchanged=int((changing & (stored.double() == before)).sum()),
        entries=int(changing.sum()),
    )


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Store all weights of a model in `dtype`.

    Raises:
        ModelError: a weight does not fit `dtype`.
    """
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name}: does not fit {dtype}; use float32")


def save_model(base: Base, folder: Path) -> None:
    """Write a model and its tokenizer so that `AutoModelForCausalLM` loads them.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        save_pretrained(base.model, base.tokenizer, folder)
    except SafetensorError as error:
        # safetensors has the file system's error only in its text
        errno = _ERRNO.search(str(error))
        raise OSError(int(errno[1]) if errno else 0, str(error)) from error
