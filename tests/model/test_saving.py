"""Models written as transformers reads them."""

import subprocess
import sys
from pathlib import Path

from tests.tiny import Tiny

PROGRAM = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from fedllm.model.saving import save_pretrained

disable_progress_bar()
kinds = (AutoModelForCausalLM, AutoTokenizer)
save_pretrained(*(kind.from_pretrained(sys.argv[1]) for kind in kinds), Path(sys.argv[2]))
"""


def test_saving_says_nothing_where_deepspeed_is_installed(tiny: Tiny, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROGRAM, str(tiny.model), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "model.safetensors").is_file()
