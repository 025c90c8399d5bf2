"""`fedllm init`: every answer gives a file that `plan` accepts."""

import json
import os
import pty
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from fedllm.config.loading import load_config
from fedllm.config.starter import PLACES, StarterAnswers, starter_text
from tests.cli.commands import FEDLLM, in_process
from tests.tiny import Tiny

COLUMNS = [
    (),
    ("client_id", "category", "instruction", "input", "output"),
    ("user", "question", "answer"),
    ("text", "label"),
    ("client_id", "messages"),
    ("prompt", "completion"),
]
ROW = {"user": "ana", "question": "red or blue?", "answer": "red"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("columns", COLUMNS, ids=",".join)
def test_every_answer_gives_a_valid_short_file(here: Path, columns: tuple[str, ...]) -> None:
    path = here / "first.yaml"
    answers = product(("embedded", "a/b c", "no"), ("embedded", "org/model"), PLACES, (True, False))
    for data, model, place, has_template in answers:
        text = starter_text(
            StarterAnswers(
                data=data, model=model, place=place, columns=columns, has_chat_template=has_template
            ),
            "first.yaml",
        )
        path.write_text(text)
        config = load_config(path)
        assert (config.data.path, config.model.path) == (data, model)
        assert config.scheduler.kind == {"here": "local", "slurm": "slurm"}[place]
        assert len(text.splitlines()) <= 60


def test_plan_accepts_the_file_for_own_columns_and_a_chat_model_on_slurm(
    here: Path, tiny: Tiny
) -> None:
    base = here / "base"
    shutil.copytree(tiny.model, base)
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [json.dumps({**ROW, "user": name}) + "\n" for name in ("ana", "ben") * 4]
    (here / "rows.jsonl").write_text("".join(rows))
    done = in_process("init", "--data", "rows.jsonl", "--model", "base", "--where", "slurm")
    assert (done.returncode, done.stdout) == (
        0,
        "wrote fedllm.yaml; next: fedllm plan fedllm.yaml\n",
    )
    planned = in_process("plan", "fedllm.yaml", "--set", f"storage.cache={tiny.cache}")
    assert planned.returncode == 0, planned.stderr
    config = load_config(here / "fedllm.yaml")
    assert (config.data.columns.client, config.data.template) == ("user", "chat")


def test_plan_accepts_the_file_for_rows_without_clients(here: Path, tiny: Tiny) -> None:
    rows = [json.dumps({"text": f"red {n}", "label": "red"}) + "\n" for n in range(40)]
    (here / "rows.jsonl").write_text("".join(rows))
    done = in_process("init", "--data", "rows.jsonl", "--model", tiny.model, "--where", "here")
    assert done.returncode == 0, done.stderr
    planned = in_process("plan", "fedllm.yaml", "--set", f"storage.cache={tiny.cache}")
    assert planned.returncode == 0, planned.stderr


def test_questions_are_asked_on_a_terminal(here: Path) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, b"\nslurm\n")  # the default model, and where
    asked = subprocess.run(
        [FEDLLM, "init", "x/first.yaml", "--data", "embedded"],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert asked.returncode == 0, asked.stderr
    config = load_config(here / "x/first.yaml")
    assert (config.model.path, config.scheduler.kind) == ("embedded", "slurm")


@pytest.mark.usefixtures("here")
def test_wrong_answers_are_one_line_and_write_nothing() -> None:
    everything = {"--data": "embedded", "--model": "embedded", "--where": "here"}
    for option, wrong, told in (
        ("--data", "rows.jsonl", "no such file or folder"),
        ("--model", "./base", "no such folder"),
        ("--where", "cloud", "need here or slurm"),
    ):
        words = [word for pair in {**everything, option: wrong}.items() for word in pair]
        done = in_process("init", "f.yaml", *words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert told in done.stderr
        assert not Path("f.yaml").exists()
    Path("f.yaml").write_text("")
    assert "exists; name another file" in in_process("init", "f.yaml").stderr
