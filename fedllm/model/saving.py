"""Models written as transformers reads them."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokenizer into a folder."""
    # where DeepSpeed is installed transformers imports it here, and it speaks on standard output
    with redirect_stdout(sys.stderr):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
