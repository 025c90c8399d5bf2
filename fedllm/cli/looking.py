"""Commands that look at a run or a plan: status, logs, plan."""

import dataclasses
from typing import Annotated

import typer

from fedllm.cli.asking import ask_about, rarely_gone
from fedllm.cli.options import (
    AsJson,
    RunFolder,
    existing_run,
    say,
    say_json,
)
from fedllm.cli.planning import plan
from fedllm.cli.watching import watch as follow
from fedllm.config.loading import read_config
from fedllm.errors import DataError
from fedllm.reporting.logs import client_log, newest_logs, tail
from fedllm.reporting.status import StatusReader
from fedllm.reporting.status_text import headline, status_text
from fedllm.scheduling.slurm_advice import advice


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (status, logs, plan):
        app.command()(command)


def status(
    run: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until the run is done, or until Ctrl-C.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Say where a run stands: its files tell, and Slurm why its tasks wait."""
    if watch and json_:
        raise typer.BadParameter("--watch is for people: leave out --json")
    paths = existing_run(run)
    reader = StatusReader(paths, gone=rarely_gone(paths), ask=ask_about(paths), advice=advice)
    if watch:
        follow(reader.read, lambda found: status_text(run, found), headline)
    elif json_:
        say_json(dataclasses.asdict(reader.read()))
    else:
        say(status_text(run, reader.read()))


def logs(
    run: RunFolder,
    client: Annotated[
        str | None, typer.Option("--client", metavar="C", help="Where this client trained last.")
    ] = None,
    lines: Annotated[int, typer.Option("--lines", help="Lines from the end of each log.")] = 20,
) -> None:
    """Print the ends of the newest logs, or the log of the task that trained a client."""
    paths = existing_run(run)
    if client is None:
        for path in newest_logs(paths):
            say(f"==> {path} <==")
            say(tail(path, lines))
        return
    found = client_log(paths, read_config(paths.config).rounds, client)
    if found is None:
        raise DataError(
            f"client {client}: no task of this run has claimed it, or "
            "its claims were pruned (storage.keep_logs); see fedllm status"
        )
    say(f"==> {found} <==")
    say(tail(found, lines))
