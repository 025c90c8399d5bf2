"""Conversations from the file to the trained round: every answer of the assistant carries loss."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from fedllm.storage.updates import read_records
from tests.cli.commands import in_process
from tests.tiny import Tiny, raw_config

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAID = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
NAMES = {"user": "human", "assistant": "gpt"}


def messages(client: str) -> dict[str, Any]:
    said = [{"role": role, "content": text} for role, text in SAID]
    return {"client_id": client, "messages": said}


def sharegpt(client: str) -> dict[str, Any]:
    said = [{"from": NAMES[role], "value": text} for role, text in SAID]
    return {"client_id": client, "conversations": said}


def completion(client: str) -> dict[str, Any]:
    return {"client_id": client, "prompt": "one", "completion": "two"}


@pytest.fixture(scope="module")
def base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small base model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "base"
    shutil.copytree(tiny.model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("row", "template", "shown", "trained"),
    [
        (
            messages,
            "chat",
            "<user>one</s><assistant>[two</s>]<user>three</s><assistant>[four</s>]",
            "messages",
        ),
        (
            sharegpt,
            "chat",
            "<user>one</s><assistant>[two</s>]<user>three</s><assistant>[four</s>]",
            "sharegpt",
        ),
        (completion, "chat", "<user>one</s><assistant>[two</s>]", "completion"),
        (completion, "plain", "one[two</s>]", "completion"),
    ],
)
def test_a_round_trains_what_the_assistant_said(
    tiny: Tiny, base: Path, tmp_path: Path, row: Any, template: str, shown: str, trained: str
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [row(client) for client in ("ana", "ben") for _ in range(4)]
    data.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")
    raw = {**raw_config(tiny.model.parent), "rounds": 1, "model": {"path": str(base)}}
    raw["data"] = {"path": str(data), "template": template, "columns": {"category": None}}
    raw["clients"] = {"tiers": {"small": {"ranks": 2}}, "cohort": {"count": 2}}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")

    done = in_process("inspect", config, "--client", "ana", "--json")
    assert done.returncode == 0, done.stderr
    marked = "".join(
        f"[{token['text']}]" if token["loss"] else token["text"]
        for token in json.loads(done.stdout)["tokens"]
    ).replace("][", "")
    assert marked == shown

    done = in_process("run", config, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert f"rows of format {trained}" in done.stderr + _logs(tmp_path / "run")
    answers = [part.partition("]")[0] for part in shown.split("[")[1:]]
    targets = sum(len(answer.replace("</s>", "x")) for answer in answers)
    updates = list((tmp_path / "run/rounds/0001/updates").rglob("*.safetensors"))
    records = [record for file in updates for record in read_records(file)]
    assert {record.client for record in records} == {"ana", "ben"}
    # every row is trained once, and each of its characters is a token
    assert all(each.loss_tokens == each.rows * targets for each in records)


def _logs(run: Path) -> str:
    return "".join(file.read_text() for file in (run / "logs").rglob("*") if file.is_file())
