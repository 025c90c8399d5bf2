"""The commands `fedllm aggregate` and `fedllm export`, as users type them."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedllm.cli.main import run
from tests.adapters.mounting import mounted
from tests.adapters.peft_folders import deltas


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the single line of a refusal."""
    assert run([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fedllm: ")
    assert said.err.count("\n") == 1
    return said.err


def test_weights_are_normalised_and_printed_with_what_was_lost(
    zoo: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"{zoo['plain']}:0.3", f"{zoo['rslora']}:0.9", "--out", str(out), "--rank", "2"]
    assert run(["aggregate", *arguments]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0].split() == ["weight", "0.2500", "rank", "2", str(zoo["plain"])]
    assert lines[1].split() == ["weight", "0.7500", "rank", "4", str(zoo["rslora"])]
    assert lines[2].startswith("2 of 6 modules: in 1 of 2 adapters only; they count as zero")
    assert "model.layers.0.mlp.gate_proj, model.layers.1.mlp.gate_proj" in lines[2]
    assert lines[3].startswith("rank 2 in 6 modules; energy kept 0.")
    least = "the error is the least possible"
    assert lines[4:7] == [
        f"2 of 24x16, rank 4 to 2: route factored, {least}",
        f"2 of 16x16, rank 6 to 2: route factored, {least}",
        f"2 of 8x16, rank 6 to 2: route factored, {least}",
    ]
    assert re.fullmatch(r"seconds: read \d.*, fold \d.*, decompose \d.*, write \d.*", lines[7])
    assert lines[8] == f"{out}: PEFT adapter, float32"


@pytest.mark.parametrize("first", ["plain", "diverged"])
def test_a_value_that_is_not_finite_is_told_where_another_adapter_lacks_the_module(
    zoo: dict[str, Path],
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: str,
) -> None:
    folder = shutil.copytree(zoo["rslora"], tmp_path / "diverged")
    path = folder / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"
    tensors = load_file(path)
    tensors[name][3, 1] = float("nan")
    save_file(tensors, path)
    folders = sorted([zoo["plain"], folder], key=lambda each: each.name != first)
    said = refused(capsys, "aggregate", *folders, "--out", out)
    assert f"{folder}: {name} holds nan at [3, 1]" in said
    assert not out.exists()


def test_a_terminal_gets_a_bar_that_goes_away(zoo: dict[str, Path], out: Path) -> None:
    ours, theirs = pty.openpty()
    program = "import sys; from fedllm.cli.main import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "aggregate", zoo["plain"], "--out", out],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        text=True,
        check=True,
        timeout=60,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "modules" in shown
    assert " of 4, 0 s" in shown
    assert done.stdout.endswith("PEFT adapter, float32\n")


def test_full_states_the_ranks_that_result(
    zoo: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(zoo["plain"]), str(zoo["rslora"])]
    assert run(["aggregate", *folders, "--out", str(out), "--rank", "full"]) == 0
    said = capsys.readouterr().out
    assert "ranks 4 to 6 in 6 modules; energy kept 1.000000" in said


def test_a_rank_above_the_smaller_side_is_lowered_with_a_line(
    zoo: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["aggregate", str(zoo["plain"]), "--out", str(out), "--rank", "12"]) == 0
    said = capsys.readouterr().out
    line = "rank limited to the smaller side in: model.layers.0.self_attn.v_proj"
    assert line in said
    assert "ranks 8 to 12 in 4 modules" in said


def test_json_holds_everything_that_is_printed(
    zoo: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(zoo["plain"]), str(zoo["rslora"])]
    assert run(["aggregate", *folders, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["weight"] for entry in found["adapters"]] == [0.5, 0.5]
    assert found["adapters"][0]["missing"] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.1.mlp.gate_proj",
    ]
    gate = found["modules"]["model.layers.0.mlp.gate_proj"]
    assert (gate["rank"], gate["stacked_rank"], gate["route"]) == (4, 4, "factored")
    assert (gate["relative_excess"], gate["failure_probability"]) == (0.0, 0.0)
    assert set(found["seconds"]) == {"read", "fold", "decompose", "write"}
    assert found["out"] == str(out)


def test_a_path_is_split_at_its_last_colon_and_only_before_a_number(
    llama: Path, zoo: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "run:3" / "client:x:7"
    shutil.copytree(zoo["plain"], odd)
    arguments = [str(odd), f"{odd}:3", f"{zoo['plain']}:1e0", "--json"]
    assert run(["aggregate", *arguments, "--out", str(tmp_path / "out")]) == 0
    entries = json.loads(capsys.readouterr().out)["adapters"]
    assert [(entry["path"], entry["weight"]) for entry in entries] == [
        (str(odd), 0.2),
        (str(odd), 0.6),
        (str(zoo["plain"]), 0.2),
    ]
    assert set(deltas(llama, tmp_path / "out")) == set(deltas(llama, zoo["plain"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{plain}:-0.5"], "its weight is -0.5"),
        (["{plain}:0", "{rslora}:0.0"], "weights are zero"),
        (["{plain}:nan"], "its weight is nan"),
        (["{plain}", "--rank", "0"], "--rank: got 0"),
        (["{plain}", "--rank", "-4"], "--rank: got -4"),
        (["{plain}", "--rank", "most"], "--rank: got 'most'"),
        (["{plain}", "--dtype", "int8"], "--dtype: got 'int8'"),
        (["{plain}", "--method", "flexlra"], "did you mean flexlora"),
        (["{plain}", "{rslora}", "--method", "factor_mean"], "factor_mean needs"),
        (["{plain}", "--device", "gpu"], "'gpu'"),
        (["{plain}", "--tolerance", "0"], "--tolerance: got 0, need a number > 0"),
        (["{plain}", "--tolerance", "nan"], "--tolerance: got nan"),
        (["{plain}", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    zoo: dict[str, Path],
    out: Path,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [argument.format(**zoo) for argument in arguments]
    assert words in refused(capsys, "aggregate", *filled, "--out", out)
    assert not out.exists()


def test_a_folder_that_holds_something_is_left_alone(
    zoo: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    (out / "mine").write_text("kept")
    assert "not empty" in refused(capsys, "aggregate", zoo["plain"], "--out", out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(zoo: dict[str, Path], out: Path) -> None:
    out.mkdir()
    assert run(["aggregate", str(zoo["plain"]), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_directory_is_one_line(zoo: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "place"
    done = mounted("ro", place, "aggregate", zoo["plain"], "--out", place / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be written (read-only file system)" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_nothing_and_a_mount_point_is_filled(
    zoo: dict[str, Path], tmp_path: Path
) -> None:
    full = mounted(
        "size=4k", tmp_path / "full", "aggregate", zoo["plain"], "--out", tmp_path / "full"
    )
    assert full.returncode == 3, full.stderr
    assert "no space left" in full.stderr
    assert full.stdout == ""
    roomy = mounted(
        "size=1m", tmp_path / "roomy", "aggregate", zoo["plain"], "--out", tmp_path / "roomy"
    )
    assert roomy.returncode == 0, roomy.stderr
    assert "adapter_model.safetensors" in roomy.stdout


def test_options_of_the_method_are_given_to_it(
    zoo: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["aggregate", str(zoo["plain"]), str(zoo["plain"]), "--out", str(out)]
    method = ["--method", "lora_fair"]
    for option, words in {
        "ridg=1": "method.options.ridg: unknown option; did you mean `method.options.ridge`?",
        "truncated=keep": "truncated: an option of flexlora, slora; lora_fair has ridge",
        "ridge=0": "method.options.ridge: got 0, need > 0",
        "ridge": "--option ridge: need NAME=VALUE, for example truncated=keep",
    }.items():
        assert words in refused(capsys, *given, *method, "--option", option)
        assert not out.exists()
    assert run([*given, *method, "--option", "ridge=1e-3"]) == 0
