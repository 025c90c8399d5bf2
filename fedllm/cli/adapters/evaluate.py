"""`fedllm evaluate`: score a run's state or a PEFT adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    AsJson,
    Overrides,
    RoundNumber,
    chosen_round,
    configuration,
    say,
    say_json,
)
from fedllm.errors import ConfigError, RunDirectoryError
from fedllm.storage.paths import RunPaths, cache_of
from fedllm.storage.records import EvaluationRecord

_PEFT_CONFIG = "adapter_config.json"


def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="A run directory, or a PEFT adapter.")
    ],
    round_: RoundNumber = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", help="Rank for all clients. Default: each one's own."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="CONFIG", help="Configuration with the data, to score an adapter."
        ),
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Score the state of a run, or a PEFT adapter, on the test rows."""
    record = _score(target, round_number=round_, rank=rank, config=config, overrides=set_ or [])
    if json_:
        say_json(record.model_dump(mode="json"))
        return
    from fedllm.reporting.results.summary import score_table

    of_run = (target / "run.json").exists()
    say(score_table(f"{target}, round {record.round}" if of_run else str(target), record))


def _score(
    target: Path,
    *,
    round_number: str | None,
    rank: int | None,
    config: Path | None,
    overrides: Sequence[str],
) -> EvaluationRecord:
    """Score a run's state or an adapter.

    Raises:
        RunDirectoryError: the target is neither.
        ConfigError: an option is missing, or not for this target.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: got {rank}, need >= 1")
    paths = RunPaths(root=target.resolve())
    if paths.run.exists():
        return _score_run(paths, chosen_round(paths, round_number), rank)
    if not (target / _PEFT_CONFIG).is_file():
        from fedllm.adapters.peft_config import adapters_below

        raise RunDirectoryError(
            f"{target}: neither a run (run.json) nor a PEFT adapter ({_PEFT_CONFIG})"
            f"{adapters_below(target)}"
        )
    if config is None:
        raise ConfigError(f"--config: missing; it says on which model and data to score {target}")
    if round_number is not None or rank is not None:
        raise ConfigError(f"--round, --rank: {target} is an adapter, they are for runs")
    return _score_adapter(target, config, overrides)


def _score_run(paths: RunPaths, round_number: int | None, rank: int | None) -> EvaluationRecord:
    from fedllm.server.export import newest_state

    number = newest_state(paths) if round_number is None else round_number
    if not paths.round(number).aggregate_record.exists():
        raise RunDirectoryError(f"--round {number}: not aggregated in {paths.root}")
    from fedllm.process.session import Session
    from fedllm.programs.evaluate import evaluate_state

    return evaluate_state(paths, number, rank, Session())


def _score_adapter(folder: Path, config: Path, overrides: Sequence[str]) -> EvaluationRecord:
    from fedllm.process.session import Session
    from fedllm.programs.evaluate import evaluate_adapter
    from fedllm.programs.prepare import prepare

    loaded = configuration(config, overrides)
    prepared = prepare(loaded, cache_of(loaded.storage.cache, execution.default_run_dir(config)))
    return evaluate_adapter(folder, loaded, prepared, Session())
