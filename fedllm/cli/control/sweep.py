"""`fedllm sweep`: run a sweep to its end."""

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import sweeps
from fedllm.cli.completion import complete_configs
from fedllm.cli.options import TakeOver, configuration_file, say, say_with_paths
from fedllm.errors import ConfigError
from fedllm.reporting.sweeps.sweep_status import sweep_status
from fedllm.reporting.sweeps.sweep_text import sweep_status_text
from fedllm.storage.paths import SweepPaths, shipped

_EXAMPLE = "configs/sweeps/example.yaml"


def sweep(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="SWEEP.yaml", help="A sweep file.", autocompletion=complete_configs),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder. Default: runs/<name of the file>."),
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print a sweep file for the embedded data.")
    ] = False,
    take_over: TakeOver = False,
) -> None:
    """Run arms, a grid and seeds over one configuration. Run it again to continue.

    On this machine one run follows the other; on Slurm they go on side by side, under one limit of
    queued tasks. `fedllm status` and `fedllm compare` take the folder.
    """
    if example:
        say(shipped(_EXAMPLE).read_text(encoding="utf-8").rstrip())
        return
    if file is None:
        raise ConfigError("fedllm sweep: need a sweep file; `fedllm sweep --example` prints one")
    file = configuration_file(file)
    paths = sweeps.create_sweep(file, out or sweeps.default_sweep_dir(file))
    finish(paths, take_over=take_over)


def finish(
    paths: SweepPaths,
    *,
    take_over: bool = False,
    accept_changes: bool = False,
    unattended: bool = False,
) -> None:
    """Take a sweep to its end and print how it ended."""
    try:
        sweeps.drive_sweep(
            paths, take_over=take_over, accept_changes=accept_changes, unattended=unattended
        )
    finally:
        say_with_paths(sweep_status_text(sweep_status(paths)))
