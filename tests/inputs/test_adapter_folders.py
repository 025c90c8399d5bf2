"""Adapter folders from disks and hubs are read, or refused with the remedy."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedllm.adapters.base_names import common_base
from fedllm.adapters.peft_config import read_adapter_config
from fedllm.adapters.peft_files import read_peft_adapter
from fedllm.adapters.peft_writer import PeftDescription, write_peft_adapter
from fedllm.cli.main import run as fedllm
from fedllm.errors import AdapterError
from fedllm.lora.factors import Factors
from tests.adapters.peft_folders import edit_config, save_adapter
from tests.tiny import Tiny

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    adapter = {
        f"model.layers.{n}.q_proj": Factors(
            a_RI=torch.randn(2, 5), b_OR=torch.randn(4, 2), scale=2.0
        )
        for n in range(2)
    }
    about = PeftDescription(base_model=None, targets={"target_modules": ["q_proj"]})
    (tmp_path / "it's a").mkdir()
    write_peft_adapter(tmp_path / "it's a", adapter, about=about)
    return tmp_path / "it's a"


def refused(folder: Path) -> str:
    with pytest.raises(AdapterError) as refusal:
        read_peft_adapter(folder)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def run_offered(message: str) -> None:
    """Run the command that an error message gives."""
    words = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *words[1:]], check=True, timeout=60)


def test_a_pickled_adapter_is_read_after_the_offered_command(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    (folder / TENSORS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    run_offered(refused(folder))
    assert set(read_peft_adapter(folder).factors) == {f"model.layers.{n}.q_proj" for n in range(2)}


def test_an_adapter_in_parts_is_read_after_the_offered_command(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    (folder / TENSORS).unlink()
    for number, name in enumerate(tensors, 1):
        part = f"adapter_model-{number:05d}-of-00004.safetensors"
        save_file({name: tensors[name]}, folder / part)
    run_offered(refused(folder))
    assert len(read_peft_adapter(folder).factors) == 2
    (folder / TENSORS).unlink()
    (folder / "adapter_model-00002-of-00004.safetensors").unlink()
    assert "3 of 4 parts" in refused(folder)


@pytest.mark.parametrize("name", [TENSORS, "adapter_config.json"])
def test_a_git_lfs_pointer_is_told(folder: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    (folder / name).write_text(pointer)
    assert "git lfs pull" in refused(folder)


def test_a_folder_of_several_adapters_names_them(folder: Path, tmp_path: Path) -> None:
    for name in ("ana", "ben"):
        shutil.copytree(folder, tmp_path / "several" / name)
    said = refused(tmp_path / "several")
    assert f"ana, ben: give {tmp_path / 'several' / 'ana'}" in said


@pytest.mark.parametrize("shape", [(0,), (10,)])
def test_what_was_saved_without_gathering_is_told(folder: Path, shape: tuple[int, ...]) -> None:
    names = load_file(folder / TENSORS)
    save_file({name: torch.zeros(shape) for name in names}, folder / TENSORS)
    assert "without gathering" in refused(folder)


@pytest.mark.parametrize(
    ("name", "text", "share"),
    [("run 12:30", "run 12:30", 1), ("run 12:30", "run 12:30:3", 3), ("a", "a:3", 3)],
)
def test_a_clock_time_in_a_folder_s_name_is_no_weight(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    share: int,
) -> None:
    shutil.copytree(folder, tmp_path / name)
    shutil.copytree(folder, tmp_path / "run 12")
    out = tmp_path / "out"
    assert fedllm(["aggregate", str(tmp_path / text), str(folder), "--out", str(out)]) == 0
    found = re.match(r"weight ([\d.]+)  rank    2  (.*)", capsys.readouterr().out)
    assert found
    assert float(found[1]) == pytest.approx(share / (share + 1), abs=1e-4)
    assert found[2] == str(tmp_path / name)


def test_revisions_of_a_hub_base_are_kept_and_never_mixed(tiny: Tiny, tmp_path: Path) -> None:
    folders = [save_adapter(tiny.model, tmp_path / name) for name in "ab"]
    for folder, revision in zip(folders, ("v1", "v1"), strict=True):
        edit_config(folder, base_model_name_or_path="org/name", revision=revision)
    configs = [read_adapter_config(folder) for folder in folders]
    assert common_base(configs, folders, "org/name").revision == "v1"
    edit_config(folders[1], revision="v2")
    configs = [read_adapter_config(folder) for folder in folders]
    with pytest.raises(AdapterError, match="different revisions of org/name"):
        common_base(configs, folders, "org/name")
    edit_config(folders[1], base_model_name_or_path="~nobody-of-this-name/x", revision=None)
    configs = [read_adapter_config(folder) for folder in folders]
    with pytest.raises(AdapterError, match="different base models"):
        common_base(configs, folders, None)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ({"(([a-z_.0-9]+)+)+!": 2}, "repeats a group"),
        ({".*.*.*.*q": 2}, "at most"),
        ({"(?i)q_proj": 2}, "not a regular expression"),
        ({f"zz{number}": 2 for number in range(30_000)}, "30000 patterns"),
    ],
)
def test_patterns_that_could_take_for_ever_are_refused_by_name(
    folder: Path, field: str, pattern: dict[str, int], why: str
) -> None:
    edit_config(folder, **{field: pattern})
    message = refused(folder)
    assert why in message and field in message and "adapter_config.json" in message


def test_a_weight_that_no_number_holds_and_an_output_inside_an_input_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedllm(["aggregate", f"{folder}:1e-400", str(folder), "--out", str(tmp_path / "o")]) == 2
    assert "its weight 1e-400 is too small" in capsys.readouterr().err
    before = sorted(folder.rglob("*"))
    assert fedllm(["aggregate", str(folder), "--out", str(folder / "o")]) == 2
    assert "lies in the adapter" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
