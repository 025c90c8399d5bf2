"""lm-evaluation-harness scores what a run exports, on a task of the user's own."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedllm.cli.execution import start
from fedllm.storage.paths import RunPaths
from tests.cli.commands import fedllm, in_process, one_line
from tests.tiny import WORDS, Tiny

TASK = """task: first_word
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["{first}", "{second}"]
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    overrides = ["rounds=1", "evaluation.every=0"]
    return RunPaths(root=start(tiny.config, overrides, tmp_path_factory.mktemp("h") / "run"))


def task_file(folder: Path) -> Path:
    rows = folder / "rows.jsonl"
    texts = [{"text": f"say {word}", "label": n % 2} for n, word in enumerate(WORDS[:4])]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    path = folder / "first_word.yaml"
    path.write_text(TASK.format(rows=rows, first=WORDS[0], second=WORDS[1]))
    return path


@pytest.mark.slow
def test_the_harness_scores_a_run_and_its_adapter_alike(
    run: RunPaths, tiny: Tiny, tmp_path: Path
) -> None:
    if find_spec("lm_eval") is None:
        # 30 packages for one command: CI goes without
        pytest.skip("lm-eval is not installed: pip install lm-eval")
    task, home = task_file(tmp_path), str(tmp_path / "hf")
    done = fedllm(
        *("evaluate", run.root, "--lm-eval", task, "--json"), HF_HUB_OFFLINE="1", HF_HOME=home
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(run.harness("round-0001-first_word").read_text())
    assert json.loads(done.stdout) == kept
    assert kept["n-samples"]["first_word"]["effective"] == 4
    assert kept["results"]["first_word"]["acc,none"] in {0.0, 0.25, 0.5, 0.75, 1.0}

    exported = in_process("export", run.root, "--out", tmp_path / "adapter")
    assert exported.returncode == 0, exported.stderr
    words = ["--config", tiny.config, "--lm-eval", task, "--out", tmp_path / "scores.json"]
    done = fedllm("evaluate", tmp_path / "adapter", *words, HF_HUB_OFFLINE="1", HF_HOME=home)
    assert done.returncode == 0, done.stderr
    assert ["first_word", "acc", "none"] in [line.split()[:3] for line in done.stdout.splitlines()]
    assert json.loads((tmp_path / "scores.json").read_text())["results"] == kept["results"]


def test_what_the_harness_needs_is_said_in_one_line(run: RunPaths, tmp_path: Path) -> None:
    if find_spec("lm_eval") is None:
        line = one_line(in_process("evaluate", run.root, "--lm-eval", "arc_easy"))
        assert "--lm-eval: needs lm-evaluation-harness" in line
        assert "pip install lm-eval" in line
        return
    line = one_line(in_process("evaluate", run.root, "--lm-eval", "arc_eesy"))
    assert "--lm-eval: the harness has no task 'arc_eesy'; did you mean arc_easy" in line
    line = one_line(in_process("evaluate", run.root, "--lm-eval", tmp_path / "none.yaml"))
    assert "none.yaml: no such file of a task" in line
    assert "--out: is for --lm-eval" in one_line(in_process("evaluate", run.root, "--out", "x"))
