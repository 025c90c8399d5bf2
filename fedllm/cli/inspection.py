"""Commands that look into data and scores: inspect, evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import AsJson, ConfigFile, Overrides, configuration, say, say_json
from fedllm.storage.paths import cache_of


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, evaluate):
        app.command()(command)


def inspect(
    config: ConfigFile,
    client: Annotated[str, typer.Option("--client", metavar="C", help="A client id.")],
    row: Annotated[int, typer.Option("--row", help="Which training row, from 0.")] = 0,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Show a client's raw row, its prompt, its tokens and which of them carry loss."""
    from fedllm.steps.inspect import describe, inspect_client

    loaded = configuration(config, set_ or [])
    cache = cache_of(loaded.storage.cache, execution.default_run_dir(config))
    found = inspect_client(loaded, cache, client, row)
    if json_:
        say_json(found.as_dict())
    else:
        say(describe(found))


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run or PEFT adapter.")],
    round_: Annotated[
        int | None, typer.Option("--round", metavar="N", help="Default: the newest state.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", help="Default: every client's own rank.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG", help="Model, data and clients of an adapter."),
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Score the state of a run, or a PEFT adapter, on the test rows that a run evaluates."""
    from fedllm.cli.scoring import score

    record = score(target, round_number=round_, rank=rank, config=config, overrides=set_ or [])
    if json_:
        say_json(record.model_dump(mode="json"))
        return
    from fedllm.reporting.summary import score_table

    of_run = (target / "run.json").exists()
    say(score_table(f"{target}, round {record.round}" if of_run else str(target), record))
