"""`fedllm run`: run a configuration to its end."""

from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    ConfigFile,
    Overrides,
    RunDir,
    TakeOver,
    say,
    summary_of,
)


def run(
    config: ConfigFile,
    run_dir: RunDir = None,
    set_: Overrides = None,
    take_over: TakeOver = False,
    unattended: Annotated[bool, typer.Option("--unattended", hidden=True)] = False,
) -> None:
    """Run a configuration to its end. Run it again to continue where it stopped."""
    root = execution.start(config, set_ or [], run_dir, take_over=take_over, unattended=unattended)
    say(summary_of(root))
