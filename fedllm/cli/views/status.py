"""`fedllm status`: show how far a run is."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.asking import cached_holder_check, scheduler_query
from fedllm.cli.live_status import watch as follow
from fedllm.cli.options import (
    RUNS,
    AsJson,
    existing_run,
    say_json,
    say_with_paths,
)
from fedllm.cli.sweeps import existing_sweep
from fedllm.config.loading import read_config
from fedllm.errors import RunFailed
from fedllm.reporting.results.summary import spectra_text
from fedllm.reporting.status.status import FAILED, StatusReader
from fedllm.reporting.status.status_text import headline, status_text
from fedllm.reporting.sweeps.sweep_status import SweepStatus, sweep_status
from fedllm.reporting.sweeps.sweep_text import sweep_headline, sweep_status_text
from fedllm.scheduling.slurm.coordinator_job import holder_is_gone
from fedllm.scheduling.slurm.wait_reasons import advice
from fedllm.scheduling.traits import traits_of
from fedllm.storage.paths import RunPaths, SweepPaths


def status(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|SWEEP", help="A run or a sweep. Default: list those below runs/."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat until the run is done, or until Ctrl-C.")
    ] = False,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="Show what adapters of each rank keep.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Show how far a run or a sweep is, and why tasks wait.

    Progress comes from the files of the run, reasons for waiting from Slurm. Exit code 1: an error
    ended the run.
    """
    if watch and json_:
        raise typer.BadParameter("--watch is for people: leave out --json")
    if run is None:
        say_with_paths(_all_runs())
        return
    if sweep := existing_sweep(run):
        _show_sweep(sweep, watch=watch, json_=json_)
        return
    paths = existing_run(run)
    if spectra:
        say_with_paths(spectra_text(paths))
        return
    reader = StatusReader(
        paths,
        gone=cached_holder_check(paths),
        ask=scheduler_query(paths),
        advice=advice,
        end_with_coordinator=not traits_of(read_config(paths.config)).jobs_outlive_coordinator,
    )
    if watch:
        follow(reader.read, lambda found: status_text(run, found), headline)
        return
    found = reader.read()
    if json_:
        say_json(dataclasses.asdict(found))
    else:
        say_with_paths(status_text(run, found))
    if found.state == FAILED:
        raise typer.Exit(RunFailed.exit_code)


def _all_runs() -> str:
    """Return a line for each run and sweep below `runs/`, the newest last."""
    folders = [path for path in RUNS.glob("*") if path.is_dir()]
    lines = []
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        paths = RunPaths(root=folder.resolve())
        if sweep := existing_sweep(folder):
            lines.append(f"{folder}: {sweep_headline(sweep_status(sweep, holder_is_gone))}")
        elif paths.run.exists():
            reader = StatusReader(paths, gone=cached_holder_check(paths))
            lines.append(f"{folder}: {headline(reader.read())}")
    return "\n".join(lines) or f"no run below {RUNS}/; start one with: fedllm run CONFIG"


def _show_sweep(paths: SweepPaths, *, watch: bool, json_: bool) -> None:
    def read() -> SweepStatus:
        return sweep_status(paths, holder_is_gone)

    if watch:
        follow(read, sweep_status_text, sweep_headline)
        return
    found = read()
    if json_:
        say_json(dataclasses.asdict(found))
    else:
        say_with_paths(sweep_status_text(found))
    if found.state == FAILED:
        raise typer.Exit(RunFailed.exit_code)
