"""`fedllm advance`: take the steps that are possible now."""

from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    AsJson,
    ConfigOrRun,
    RunDir,
    say,
    say_json,
)
from fedllm.errors import LeaseError


def advance(
    run: ConfigOrRun,
    run_dir: RunDir = None,
    json_: AsJson = False,
    chained: Annotated[
        bool, typer.Option("--chained", help="As a Slurm job: submit the next one first.")
    ] = False,
) -> None:
    """Take all steps of a run that are possible now, then return.

    For cron, or by hand. Exit code 3: the run is not done yet.
    """
    if chained:
        say("done" if execution.advance_link(run) else "not done yet")
        return
    try:
        done = execution.advance_run(run, run_dir)
    except LeaseError as error:
        # from cron this is as normal as a step that is not possible yet
        say(str(error))
        raise typer.Exit(3) from error
    if json_:
        say_json({"done": done})
    else:
        say("done" if done else "not done yet; advance again later")
    if not done:
        raise typer.Exit(3)
