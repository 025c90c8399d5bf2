"""`fedllm inspect`: show what a client's row becomes."""

from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import AsJson, ConfigFile, Overrides, configuration, say, say_json
from fedllm.storage.paths import cache_of


def inspect(
    config: ConfigFile,
    client: Annotated[str, typer.Option("--client", metavar="C", help="A client id.")],
    row: Annotated[int, typer.Option("--row", help="Number of the training row, from 0.")] = 0,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Show a client's row, its prompt, and the tokens with loss."""
    from fedllm.programs.inspect import describe, inspect_client

    loaded = configuration(config, set_ or [])
    cache = cache_of(loaded.storage.cache, execution.default_run_dir(config))
    found = inspect_client(loaded, cache, client, row)
    if json_:
        say_json(found.as_dict())
    else:
        say(describe(found))
