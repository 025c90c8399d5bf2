"""`fedllm status`: show how far a run is."""

import dataclasses
from typing import Annotated

import typer

from fedllm.cli.asking import cached_holder_check, scheduler_query
from fedllm.cli.live_status import watch as follow
from fedllm.cli.options import (
    AsJson,
    RunFolder,
    existing_run,
    say,
    say_json,
)
from fedllm.errors import RunFailed
from fedllm.reporting.status.status import FAILED, StatusReader
from fedllm.reporting.status.status_text import headline, status_text
from fedllm.scheduling.slurm.wait_reasons import advice


def status(
    run: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat until the run is done, or until Ctrl-C.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Show how far a run is, and why its tasks wait.

    Progress comes from the files of the run, reasons for waiting from Slurm. Exit code 1: an error
    ended the run.
    """
    if watch and json_:
        raise typer.BadParameter("--watch is for people: leave out --json")
    paths = existing_run(run)
    reader = StatusReader(
        paths, gone=cached_holder_check(paths), ask=scheduler_query(paths), advice=advice
    )
    if watch:
        follow(reader.read, lambda found: status_text(run, found), headline)
        return
    found = reader.read()
    if json_:
        say_json(dataclasses.asdict(found))
    else:
        say(status_text(run, found))
    if found.state == FAILED:
        raise typer.Exit(RunFailed.exit_code)
