"""`fedllm logs`: print the ends of a run's logs."""

from typing import Annotated

import typer

from fedllm.cli.options import (
    RunFolder,
    existing_run,
    say,
    say_with_paths,
)
from fedllm.config.loading import read_config
from fedllm.errors import DataError
from fedllm.reporting.status.logs import client_log, newest_logs, tail


def logs(
    run: RunFolder,
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="C", help="Print the log of this client's last training."),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", help="Lines from the end of each log.")] = 20,
) -> None:
    """Print the ends of a run's newest logs, or of one client's log."""
    paths = existing_run(run)
    if client is None:
        for path in newest_logs(paths):
            say_with_paths(f"==> {path} <==")
            say(tail(path, lines))
        return
    found = client_log(paths, read_config(paths.config).rounds, client)
    if found is None:
        raise DataError(
            f"client {client}: no task of this run has claimed it, or "
            "its claims were pruned (storage.keep_logs); see fedllm status"
        )
    say_with_paths(f"==> {found} <==")
    say(tail(found, lines))
