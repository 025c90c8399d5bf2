"""Commands that look at a run or a plan: status, logs, plan."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.asking import ask_about, rarely_gone
from fedllm.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    RunFolder,
    configuration,
    existing_run,
    fresh_folder,
    say,
    say_json,
)
from fedllm.cli.watching import watch as follow
from fedllm.config.loading import read_config
from fedllm.config.models import Config
from fedllm.errors import DataError
from fedllm.reporting.logs import client_log, newest_logs, tail
from fedllm.reporting.plan import Geometry, describe_plan, plan_geometry
from fedllm.reporting.status import StatusReader
from fedllm.reporting.status_text import headline, status_text
from fedllm.scheduling.seam import Job
from fedllm.storage.paths import RunPaths, cache_of
from fedllm.storage.publish import publish_bytes


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
    reader = StatusReader(paths, gone=rarely_gone(paths), ask=ask_about(paths))
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


def plan(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the sbatch files here.")
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Print the arrays of a round, their tasks, bundles, bytes and files; submit nothing."""
    from fedllm.steps.prepare import prepare as prepare_step

    loaded = configuration(config, set_ or [])
    if out is not None:
        fresh_folder(out)
    prepared = prepare_step(loaded, cache_of(loaded.storage.cache, Path("runs") / config.stem))
    geometry = plan_geometry(loaded, prepared)
    if json_:
        say_json(dataclasses.asdict(geometry))
    else:
        say(describe_plan(geometry))
    if out is not None:
        _write_sbatch_files(loaded, geometry, execution.default_run_dir(config).resolve(), out)


def _write_sbatch_files(config: Config, geometry: Geometry, root: Path, out: Path) -> None:
    from fedllm.scheduling.slurm import SlurmScheduler

    scheduler = SlurmScheduler(section=config.scheduler)
    paths = RunPaths(root=root)
    for array in geometry.arrays:
        job = Job(
            name=f"fedllm-plan-r0001-a01-{array.worker_class}-0",
            program="client",
            argv=(str(paths.round(1).attempt(1).root), "--class", array.worker_class),
            tasks=array.tasks,
            options=array.options,
            log_folder=paths.logs(1),
        )
        publish_bytes(out / f"{job.name}.sbatch", scheduler.sbatch_text(job).encode())
        say(f"wrote {out / job.name}.sbatch")
