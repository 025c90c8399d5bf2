"""Every example runs as its comments say, on a base small enough for a test."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fedllm.config.models import DataSection
from fedllm.data.prompts import TEMPLATES
from fedllm.data.readers import open_source
from fedllm.data.turns import TextRow
from fedllm.storage.paths import CachePaths
from tests.cli.commands import in_process
from tests.tiny import Tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LONGEST_LINES = 60
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that has the examples, as the repository has."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "configs").symlink_to(EXAMPLES.parent / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


def program(name: str) -> ModuleType:
    """Return an example as a module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def run_short(name: str, *changes: str) -> None:
    """Run an example's configuration for one round."""
    least = ["rounds=1", "scheduler.kind=inline", "training.max_steps=1", "evaluation.every=0"]
    options = [word for change in (*least, *changes) for word in ("--set", change)]
    done = in_process("run", f"examples/{name}.yaml", *options)
    assert done.returncode == 0, done.stderr


def small_base(tiny: Tiny) -> list[str]:
    return [f"model.path={tiny.model}", f"storage.cache={tiny.cache}"]


def test_an_example_fits_on_a_page_and_stands_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text("utf-8")
    files = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml", ".ipynb")]
    assert len(files) > 8
    assert not [path.name for path in files if f"]({path.name})" not in table]
    texts = {path.name: path.read_text("utf-8") for path in files if path.suffix != ".ipynb"}
    assert not [name for name, text in texts.items() if text.count("\n") > LONGEST_LINES]


def test_own_rows_train(here: Path, tiny: Tiny) -> None:
    run_short("own_data", *small_base(tiny))
    assert (here / "runs/own_data/rounds/0001/round.json").exists()


def test_a_model_with_a_chat_template_trains_on_conversations(here: Path, tiny: Tiny) -> None:
    base = here / "base"
    shutil.copytree(tiny.model, base)
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # products in float32: bfloat16 takes minutes on processors without it
    run_short("chat_model", f"model.path={base}", "training.precision=float32")
    assert (here / "runs/chat_model/rounds/0001/round.json").exists()


def test_a_method_beside_its_configuration_trains(here: Path, tiny: Tiny) -> None:
    run_short("own_method", *small_base(tiny), f"data.path={tiny.data}", "data.cutoff_tokens=160")
    aggregate = here / "runs/own_method/rounds/0001/aggregate/aggregate.json"
    assert json.loads(aggregate.read_text())["round"] == 1


def test_two_methods_are_drawn_into_one_plot(here: Path, tiny: Tiny, finished: Path) -> None:
    out = here / "out"
    shutil.copytree(finished, out / "arm-0")
    plot = program("two_methods").compare(tiny.config, out, [])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_an_exported_adapter_answers(here: Path, finished: Path) -> None:
    assert in_process("export", finished, "--out", here / "adapter").returncode == 0
    served = program("serve_adapter")
    assert isinstance(served.answer(here / "adapter", "Reverse.", "one two", max_new_tokens=2), str)


def test_a_served_prompt_is_the_one_that_was_trained() -> None:
    served = program("serve_adapter").PROMPT.format(instruction="Reverse.", input="one two")
    row = TextRow(instruction="Reverse.", input="one two", references=["two one"])
    assert served == TEMPLATES["alpaca"](None).script(row).prompt


def test_the_sweep_of_learning_rates_is_planned(here: Path, tiny: Tiny) -> None:
    raw = yaml.safe_load((EXAMPLES / "learning_rates.yaml").read_text("utf-8"))
    raw["base"] = str(tiny.config)
    raw["set"] |= {"clients.dev": 1, "clients.unseen": 1, "clients.cohort.count": 4}
    (here / "short.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    planned = in_process("plan", here / "short.yaml")
    assert planned.returncode == 0, planned.stderr
    # 2 arms at 4 rates, 3 seeds of each, and the A/A arm
    totals = [line.split() for line in planned.stdout.splitlines() if line.startswith("all ")]
    assert [words[1] for words in totals] == ["17"]


def test_the_run_on_preemptible_nodes_is_planned(here: Path, tiny: Tiny) -> None:
    changes = [*small_base(tiny), f"data.path={tiny.data}", "clients.cohort.count=8"]
    options = [word for change in changes for word in ("--set", change)]
    planned = in_process("plan", "examples/slurm_preemption.yaml", *options, "--out", here / "plan")
    assert planned.returncode == 0, planned.stderr
    scripts = "\n".join(path.read_text() for path in (here / "plan").rglob("*.sbatch"))
    assert "--partition=preemptible" in scripts
    assert "--requeue" in scripts


def test_the_papers_clients_are_read_from_the_converted_files(tmp_path: Path) -> None:
    source, out = tmp_path / "1613", tmp_path / "parquet"
    source.mkdir()
    for split in ("training", "eval", "test"):
        for client in (0, 2, 10):
            rows = [
                {"category": "Text Matching 7.json", "instruction": "I", "input": n, "output": "é"}
                for n in ("a", "b")
            ]
            file = source / f"local_{split}_{client}.json"
            file.write_text(json.dumps(rows), encoding="utf-8")
    program("natural_instructions").convert(source, out)
    section = DataSection(path=str(out))
    tables = open_source(section, CachePaths(root=tmp_path / "cache"), 0).read()
    assert sorted(tables) == ["test", "train", "validation"]
    for table in tables.values():
        assert table["client"].to_pylist() == ["0", "0", "2", "2", "10", "10"]
        assert set(table["category"].to_pylist()) == {"Text Matching"}
        assert table["references"].to_pylist() == [["é"]] * 6
    assert pq.read_schema(out / "train.parquet").field("client_id").type == pa.int32()
