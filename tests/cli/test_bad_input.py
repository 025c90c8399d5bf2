"""Bad input gets one line that names the thing and the remedy, and loses nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.commands import fedllm, in_process, one_line
from tests.tiny import Tiny


def test_all_unknown_keys_are_told_at_once_with_the_nearest_valid_name(
    tiny: Tiny, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    wrong = ["--set", "training.learning_rat=1", "--set", "sed=1", "--set", "rounds=0"]
    done = in_process("run", tiny.config, "--run-dir", root, *wrong)
    assert done.returncode == 2
    assert "training.learning_rat: unknown key; did you mean `training.learning_rate`?" in (
        done.stderr
    )
    assert "sed: unknown key; did you mean `seed`?" in done.stderr
    assert "rounds: got 0, need >= 1" in done.stderr
    assert not root.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.columns.output=answer", ["answer", "data.columns.output", "output"]),
        ("data.path=nowhere.jsonl", ["data.path", "nowhere.jsonl"]),
        ("model.path=nowhere", ["model.path", "nowhere"]),
        ("clients.tiers.small.ranks=33", ["layers.0", "33", "ranks_above_module"]),
        ("clients.cohort.count=100", ["clients.cohort.count", "100", "8"]),
        ("method.name=flexlra", ["method.name", "flexlora"]),
        ("method.local=fedot", ["method.local", "fedit"]),
        ("method.name=factor_mean", ["factor_mean", "rank"]),
        ("method.options.zebra=1", ["method.options.zebra", "unknown option", "flexlora"]),
        ("clients.assign.nobody=small", ["clients.assign.nobody"]),
    ],
)
def test_a_wrong_value_is_one_line(
    tiny: Tiny, tmp_path: Path, change: str, words: list[str]
) -> None:
    root = tmp_path / "run"
    line = one_line(in_process("run", tiny.config, "--run-dir", root, "--set", change))
    for word in words:
        assert word in line
    assert not root.exists()


def test_a_gpu_that_is_not_there_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    change = "training.device=cuda:7"
    line = one_line(in_process("run", tiny.config, "--run-dir", tmp_path / "run", "--set", change))
    assert "cuda:7" in line


def test_a_run_directory_of_another_configuration_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert in_process("run", tiny.config, "--run-dir", root, "--set", "rounds=1").returncode == 0
    line = one_line(
        in_process("run", tiny.config, "--run-dir", root, "--set", "training.max_steps=4")
    )
    assert "training.max_steps (3 in the run, now 4)" in line
    keys = ("seed=9", "lora.alpha=3", "training.batch_size=3", "training.epochs=2")
    more = ("training.max_steps=4", "training.clip_norm=2", "training.warmup_steps=1")
    words = [word for key in (*keys, *more) for word in ("--set", key)]
    line = one_line(in_process("run", tiny.config, "--run-dir", root, *words))
    assert line.count(" in the run, now ") == 5
    assert " and 2 more; these keys are frozen" in line
    # a run directory where a configuration is wanted, and the reverse
    line = one_line(in_process("run", root))
    assert f"{root}: a run directory" in line
    assert f"to go on with the run: fedllm resume {root}" in line
    line = one_line(in_process("status", tiny.config))
    assert "this command needs a run directory; `fedllm run` starts its run, in runs/tiny" in line


def test_a_missing_configuration_or_run_is_one_line(tmp_path: Path) -> None:
    assert "no such configuration file" in one_line(in_process("run", tmp_path / "no.yaml"))
    assert "no run here" in one_line(in_process("resume", tmp_path))
    assert "no run here" in one_line(in_process("status", tmp_path / "nothing"))


def test_a_key_that_is_set_with_a_blank_is_one_line_with_the_right_words(tiny: Tiny) -> None:
    line = one_line(in_process("run", tiny.config, "--set", "rounds", "5"))
    assert line.endswith("--set rounds 5: write it without a blank: --set rounds=5")


def test_a_folder_that_takes_no_files_is_one_line(tiny: Tiny) -> None:
    line = one_line(in_process("run", tiny.config, "--run-dir", "/proc/run"))
    assert "/proc/run" in line
    assert "cannot be written" in line


def test_answers_that_are_all_empty_are_one_line(tiny: Tiny, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in tiny.data.read_text(encoding="utf-8").splitlines()]
    data = tmp_path / "empty.jsonl"
    data.write_text("".join(json.dumps({**row, "output": ""}) + "\n" for row in rows))
    done = in_process("plan", tiny.config, "--set", f"data.path={data}")
    assert done.returncode == 2
    # above it stands how the file is read
    line = done.stderr.splitlines()[-1]
    assert f"data.path: {data}: no row to train; 200 rows without an answer" in line


def test_a_configuration_without_paths_names_the_keys(tiny: Tiny, tmp_path: Path) -> None:
    raw = yaml.safe_load(tiny.config.read_text(encoding="utf-8"))
    del raw["data"]["path"]
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")
    line = one_line(in_process("run", config, "--run-dir", tmp_path / "run"))
    assert "data.path" in line
    assert "FEDLLM_DATA" in line
    done = fedllm("plan", config, FEDLLM_DATA=str(tiny.data))
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a read-only file system needs root")
def test_a_read_only_directory_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    command = f"mount -t tmpfs -o ro tmpfs {place} && fedllm run {tiny.config} --run-dir {place}/r"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert "cannot be written (read-only file system)" in one_line(done)


def test_an_unknown_client_gets_the_nearest_ids(tiny: Tiny) -> None:
    line = one_line(in_process("inspect", tiny.config, "--client", "plane"))
    assert "plain" in line


def test_inspect_shows_row_prompt_tokens_and_loss_mask(tiny: Tiny) -> None:
    done = in_process("inspect", tiny.config, "--client", "émoji 🦊")
    assert done.returncode == 0, done.stderr
    assert "Response" in done.stdout


def test_an_unknown_option_is_one_line(tiny: Tiny) -> None:
    assert "--runs-dir" in one_line(in_process("run", tiny.config, "--runs-dir", "x"))


def test_a_truncated_update_is_named_and_redone(tiny: Tiny, tmp_path: Path) -> None:
    first, root = tmp_path / "first", tmp_path / "run"
    assert in_process("run", tiny.config, "--run-dir", first, "--set", "rounds=1").returncode == 0
    shutil.copytree(first, root)
    victim = sorted(root.glob("rounds/0001/updates/*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    for made_from_it in ("collection.json", "aggregate", "round.json", "evaluation"):
        path = root / "rounds" / "0001" / made_from_it
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = in_process("resume", root)
    assert done.returncode == 0, done.stderr
    assert victim.name in done.stdout
    states = [p / "rounds/0001/aggregate/global.safetensors" for p in (first, root)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_a_configuration_that_comes_with_fedllm_is_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(in_process("run", "configs/quickstart.yaml", "--set", "rounds=0"))
    assert "rounds: got 0, need >= 1" in line
