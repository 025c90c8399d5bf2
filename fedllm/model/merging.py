"""Changes merged into the weights of a base model, and the model saved.

Legend: O out, I in.
"""

import re
import sys
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fedllm.errors import ModelError
from fedllm.model.base import Base

_ERRNO = re.compile(r"os error (\d+)")


def plain_lines_in_a_log() -> None:
    """Let transformers draw its progress bars on a terminal only."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def merge(model: nn.Module, module: str, change_OI: Tensor) -> None:
    """Add a change (O, I) to the weight of `module` in place, rounding once.

    Raises:
        ModelError: the weight is also that of another module, which would change with it.
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
    change = change_OI.T if isinstance(owner, Conv1D) else change_OI
    weight.data.copy_(weight.data.double() + change)


def save_model(base: Base, folder: Path) -> None:
    """Write a model and its tokenizer so that `AutoModelForCausalLM` loads them.

    Raises:
        OSError: they cannot be written.
    """
    try:
        base.model.save_pretrained(folder)  # type: ignore[operator]
        base.tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        # safetensors hides what the file system said in its words
        found = _ERRNO.search(str(error))
        raise OSError(int(found[1]) if found else 0, str(error)) from error
