"""`fedllm inspect`: show what a client's row becomes, or all clients."""

from typing import Annotated

import typer

from fedllm.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    configuration,
    default_run_dir,
    say,
    say_json,
)
from fedllm.cli.progress_bar import progress_bar
from fedllm.errors import ConfigError
from fedllm.scheduling.traits import cache_for


def inspect(
    config: ConfigFile,
    client: Annotated[
        str | None, typer.Option("--client", metavar="C", help="A client id.")
    ] = None,
    clients: Annotated[
        bool, typer.Option("--clients", help="Show all clients: rows, categories, lengths, tiers.")
    ] = False,
    row: Annotated[int, typer.Option("--row", help="Number of the training row, from 0.")] = 0,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Show a client's row, prompt and tokens, or all clients."""
    if clients == (client is not None):
        raise ConfigError("fedllm inspect: need --client C for one client, or --clients for all")
    loaded = configuration(config, set_ or [])
    cache = cache_for(loaded, default_run_dir(config))
    if client is None:
        from fedllm.programs.inspect_clients import describe_clients, inspect_clients

        with progress_bar() as count:
            partition = inspect_clients(loaded, cache, count)
        if json_:
            say_json(partition.as_dict())
        else:
            say(describe_clients(partition))
        return
    from fedllm.programs.inspect import describe, inspect_client

    found = inspect_client(loaded, cache, client, row)
    if json_:
        say_json(found.as_dict())
    else:
        say(describe(found))
