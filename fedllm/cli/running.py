"""Commands that make a run go on: run, resume, submit, prepare, advance, cancel."""

import os
import signal
import time
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    RunDir,
    RunFolder,
    TakeOver,
    configuration,
    existing_run,
    say,
    say_json,
)
from fedllm.config.loading import read_config
from fedllm.reporting.summary import run_summary
from fedllm.rounds.cancelling import cancel_jobs
from fedllm.scheduling.slurm_coordinator import cancel_job, holder_is_gone
from fedllm.storage.lease import highest, process_is_gone
from fedllm.storage.paths import RunPaths, cache_of
from fedllm.storage.records import LeaseRecord

_LONGEST_PAUSE_SECONDS = 30.0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (run, resume, submit, prepare, advance, cancel):
        app.command()(command)


def run(
    config: ConfigFile,
    run_dir: RunDir = None,
    set_: Overrides = None,
    take_over: TakeOver = False,
) -> None:
    """Run a configuration to its end; run it again to go on where it stopped."""
    root = execution.start(config, set_ or [], run_dir, take_over=take_over)
    say(run_summary(existing_run(root)))


def resume(run: RunFolder, set_: Overrides = None, take_over: TakeOver = False) -> None:
    """Go on with a run. Execution keys may change, and `rounds` may grow."""
    execution.resume(run, set_ or [], take_over=take_over)
    say(run_summary(existing_run(run)))


def submit(config: ConfigFile, run_dir: RunDir = None, set_: Overrides = None) -> None:
    """Submit the coordinator as a small Slurm job; it submits everything else."""
    from fedllm.rounds.opening import close_run
    from fedllm.scheduling.slurm_coordinator import submit_coordinator

    loaded = configuration(config, set_ or [])
    root = run_dir or execution.default_run_dir(config)
    opened = execution.opened(root, loaded)
    close_run(opened)
    job = submit_coordinator(opened.paths.root, loaded, opened.record.run_id)
    say(f"coordinator job {job}; fedllm status {root}")


def prepare(config: ConfigFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Fetch, fingerprint and tokenise, where the network is; everything else runs offline."""
    from fedllm.steps.prepare import prepare as prepare_step

    loaded = configuration(config, set_ or [])
    cache = cache_of(loaded.storage.cache, execution.default_run_dir(config))
    prepared = prepare_step(loaded, cache)
    if json_:
        say_json(prepared.model_dump(mode="json"))
        return
    rows = sum(client.train_rows for client in prepared.clients)
    trainable = sum(client.train_rows > 0 for client in prepared.clients)
    say(f"model {prepared.model_path} ({prepared.model_parameters:,} parameters)")
    say(f"data {prepared.data_path}: {trainable} clients, {rows:,} training rows")
    cut = sum(client.truncated_rows for client in prepared.clients)
    dropped = sum(client.dropped_rows for client in prepared.clients)
    say(f"{cut:,} rows truncated, {dropped:,} dropped without an answer")


def advance(run: RunFolder, json_: AsJson = False) -> None:
    """Take the steps that are possible now and return: for cron, or by hand."""
    done = execution.advance_run(run)
    if json_:
        say_json({"done": done})
    else:
        say("done" if done else "not done yet; advance again later")
    if not done:
        raise typer.Exit(3)


def cancel(
    run: RunFolder,
    jobs_only: Annotated[
        bool, typer.Option("--jobs-only", help="Leave the coordinator alone.")
    ] = False,
) -> None:
    """End a run's jobs and its coordinator, nothing else. Resume goes on."""
    paths = existing_run(run)
    if not jobs_only:
        say(_end_coordinator(paths))
    config = read_config(paths.config)
    scheduler = execution.make_scheduler(paths, config)
    try:
        ended = cancel_jobs(paths, config, scheduler)
    finally:
        scheduler.close()
    say(f"{ended} tasks cancelled" if ended else "no task was at work")


def _end_coordinator(paths: RunPaths) -> str:
    number, holder = highest(paths)
    if holder is None or paths.released(number).exists():
        return "no coordinator is at work"
    if holder.slurm_job:
        cancel_job(holder.slurm_job)
        _await_end(holder)
        return f"coordinator job {holder.slurm_job} cancelled"
    gone = process_is_gone(holder)
    if gone is None:
        return f"coordinator {number} is on {holder.host}, pid {holder.pid}: end it there"
    if not gone:
        os.kill(holder.pid, signal.SIGTERM)
        _await_end(holder)
        return f"coordinator {number} (pid {holder.pid}) told to stop"
    return "no coordinator is at work"


def _await_end(holder: LeaseRecord) -> None:
    """Wait for a coordinator that was told to stop: until then it may submit more."""
    seconds = 0.1
    while not holder_is_gone(holder) and seconds < _LONGEST_PAUSE_SECONDS:
        time.sleep(seconds)
        seconds *= 2
