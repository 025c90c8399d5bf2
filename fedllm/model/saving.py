"""Models written as transformers reads them."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer into a folder."""
    # where DeepSpeed is installed transformers imports it here: told the kind of device, it does
    # not warn that it found no GPU; and it speaks on standard output
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with redirect_stdout(sys.stderr):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
