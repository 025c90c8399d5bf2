"""lm-evaluation-harness, as it is installed, on a run's state or an adapter."""

import difflib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedllm.config.models import Config
from fedllm.errors import ConfigError
from fedllm.model.device import resolve_device
from fedllm.server.export import export_adapter, export_model, open_state
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord, PreparedRecord

_PACKAGE = "lm_eval"
_OPTION = "--lm-eval"
_TASK_FILE = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """Tasks that the harness knows; `manager` is its own register of them."""

    names: tuple[str, ...]
    manager: Any


@dataclass(frozen=True, kw_only=True)
class HarnessModel:
    """The model to score: a base, and the PEFT adapter on it (None: it is merged already)."""

    base: Path
    adapter: Path | None
    config: Config


def harness_tasks(given: str) -> HarnessTasks:
    """Return tasks by their names, separated by commas; one that ends in `.yaml` is a file.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    if find_spec(_PACKAGE) is None:
        raise ConfigError(
            f"{_OPTION}: needs lm-evaluation-harness, which is not installed here; "
            "pip install lm-eval"
        )
    words = [word.strip() for word in given.split(",") if word.strip()]
    files = [Path(word) for word in words if word.endswith(_TASK_FILE)]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{_OPTION}: {file}: no such file of a task")
    tasks: Any = import_module("lm_eval.tasks")
    folders = list(dict.fromkeys(str(file.parent.resolve()) for file in files))
    manager = tasks.TaskManager(include_path=folders or None)
    names = [_name_in(Path(word)) if word.endswith(_TASK_FILE) else word for word in words]
    known = set(manager.all_tasks)
    for name in names or [""]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ConfigError(f"{_OPTION}: the harness has no task {name!r}; {hint}")
    return HarnessTasks(names=tuple(names), manager=manager)


def _name_in(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"task", "group"} and value.strip():
            return value.strip().strip("\"'")
    raise ConfigError(f"{_OPTION}: {file}: names no task (no line `task: NAME`)")


def score_run(
    paths: RunPaths, round_number: int, rank: int | None, tasks: HarnessTasks
) -> dict[str, Any]:
    """Export a round's state to a temporary folder and return the harness's scores of it.

    Where the method changes the base, or the base is quantised, the model is merged.
    """
    state = open_state(paths, round_number)
    record = AggregateRecord.read(paths.round(round_number).aggregate_record)
    merges = record.base_change is not None or state.config.model.quantization != "none"
    with tempfile.TemporaryDirectory(prefix="fedllm-harness-") as folder:
        out = Path(folder) / "model"
        if merges:
            export_model(state, out, rank=rank)
        else:
            export_adapter(state, out, rank=rank)
        base = out if merges else Path(state.prepared.model_path)
        model = HarnessModel(base=base, adapter=None if merges else out, config=state.config)
        return run_harness(model, tasks)


def score_adapter(
    folder: Path, config: Config, prepared: PreparedRecord, tasks: HarnessTasks
) -> dict[str, Any]:
    """Return the harness's scores of a PEFT adapter on the configuration's base."""
    base = Path(prepared.model_path)
    return run_harness(HarnessModel(base=base, adapter=folder.resolve(), config=config), tasks)


def run_harness(model: HarnessModel, tasks: HarnessTasks) -> dict[str, Any]:
    """Run the harness and return its results, without the single rows, as JSON can hold them."""
    evaluator: Any = import_module("lm_eval.evaluator")
    arguments: dict[str, Any] = {
        "pretrained": str(model.base),
        "dtype": model.config.model.dtype,
    }
    if model.adapter is not None:
        arguments["peft"] = str(model.adapter)
    found: Mapping[str, Any] = evaluator.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        device=str(resolve_device(model.config.training.device)),
        batch_size=model.config.evaluation.batch_size,
        log_samples=False,
    )
    loaded: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return loaded


def harness_rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Return a row per task and metric: the value, and its standard error where it is known."""
    rows = []
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            if isinstance(value, int | float) and "_stderr" not in name and "," in name:
                metric, _, rest = name.partition(",")
                error = metrics.get(f"{metric}_stderr,{rest}")
                spread = f"{error:.4f}" if isinstance(error, float) else "-"
                rows.append([task, metric, rest, f"{value:.4f}", spread])
    return rows
