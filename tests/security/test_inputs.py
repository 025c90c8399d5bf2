"""Configurations, data, bases and adapters that nobody meant."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapters.peft_writer import PeftDescription, write_peft_adapter
from fedllm.lora.factors import Factors
from fedllm.storage.paths import shipped
from tests.security.answers import answer, replaced, unchanged
from tests.security.mutations import mutated, profile
from tests.tiny import Tiny, raw_config

NAMES = ("quickstart.yaml", "natural-instructions-small.yaml", "natural-instructions.yaml")
CONFIGS = [shipped(f"configs/{name}").read_bytes() for name in NAMES]
ROW = {"client_id": "a", "instruction": "i", "input": "x", "output": "y", "category": "c"}
ROWS = "".join(json.dumps({**ROW, "client_id": f"c{n % 3}"}) + "\n" for n in range(12)).encode()
TABLE = b"client_id,category,instruction,input,output\n" + b"a,c,i,x,y\nb,c,i,z,w\n" * 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("security")


@profile("config")
@given(text=mutated(CONFIGS), change=st.sampled_from([[], ["--set", "rounds=true"]]))
def test_no_configuration_is_more_than_a_few_lines_of_errors(
    place: Path, text: bytes, change: list[str]
) -> None:
    file = place / "c.yaml"
    file.write_bytes(text)
    # a base that does not exist: a configuration that is valid is refused next
    words = [*change, "--set", "model.path=/nowhere", "--set", f"storage.cache={place / 'none'}"]
    with unchanged(place):
        assert answer("plan", file, *words) == 2


@profile("data")
@given(content=mutated([ROWS, TABLE]), suffix=st.sampled_from(["jsonl", "json", "csv"]))
def test_no_data_are_more_than_a_few_lines_of_errors(
    tiny: Tiny, place: Path, content: bytes, suffix: str
) -> None:
    data = place / f"rows.{suffix}"
    data.write_bytes(content)
    raw = raw_config(tiny.model.parent)
    raw["data"] = {"path": str(data)}
    raw["storage"] = {"cache": str(place / "cache")}
    file = place / "data.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    answer("inspect", file, "--clients")
    assert not list((place / "cache").glob("**/.*.part"))
    shutil.rmtree(place / "cache", ignore_errors=True)


BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@profile("models")
@given(data=st.data(), name=st.sampled_from(BASE_FILES))
def test_no_base_is_more_than_a_few_lines_of_errors(
    tiny: Tiny, place: Path, data: st.DataObject, name: str
) -> None:
    base = place / "base"
    shutil.copytree(tiny.model, base, dirs_exist_ok=True)
    content = data.draw(mutated([(base / name).read_bytes()]))
    words = ("--set", f"model.path={base}", "--set", f"storage.cache={place / 'cache'}")
    with replaced(base / name, content):
        answer("plan", tiny.config, *words)
    shutil.rmtree(place / "cache", ignore_errors=True)


def adapter(folder: Path, rank: int) -> Path:
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    draw = torch.Generator().manual_seed(rank)
    factors = {
        name: Factors(
            a_RI=torch.randn(rank, 5, generator=draw),
            b_OR=torch.randn(4, rank, generator=draw),
            scale=2.0,
        )
        for name in names
    }
    folder.mkdir(exist_ok=True)
    about = PeftDescription(base_model=None, targets={"target_modules": ["q_proj"]})
    write_peft_adapter(folder, factors, about=about)
    return folder


@profile("adapters")
@given(
    data=st.data(),
    name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    weight=st.sampled_from(["", ":2", ":1e-400", ":-1", ":nan", ":1e999", ":x", "::"]),
)
def test_no_adapter_is_more_than_a_few_lines_of_errors(
    place: Path, data: st.DataObject, name: str, weight: str
) -> None:
    one, two = place / "one", place / "two"
    if not two.exists():
        adapter(one, 2), adapter(two, 3)
    content = data.draw(mutated([(one / name).read_bytes()]))
    out = place / "out"
    with replaced(one / name, content):
        code = answer("aggregate", f"{one}{weight}", two, "--out", out)
    assert (code == 0) == out.exists()
    shutil.rmtree(out, ignore_errors=True)
