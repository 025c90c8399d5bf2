"""Commands that make a run go on: run, resume, submit, prepare, advance, cancel."""

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
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
from fedllm.config.models import Config
from fedllm.errors import LeaseError
from fedllm.planning.backoff import Backoff
from fedllm.reporting.summary import run_summary
from fedllm.rounds.cancelling import cancel_jobs
from fedllm.scheduling.slurm_coordinator import (
    cancel_job,
    coordinator_jobs,
    job_is_gone,
)
from fedllm.scheduling.traits import traits_of
from fedllm.storage.lease import highest, process_is_gone
from fedllm.storage.paths import RunPaths, cache_of
from fedllm.storage.records import RunRecord

ConfigOrRun = Annotated[
    Path, typer.Argument(metavar="CONFIG|RUN", help="A configuration, or a run to go on with.")
]

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
    unattended: Annotated[bool, typer.Option("--unattended", hidden=True)] = False,
) -> None:
    """Run a configuration to its end; run it again to go on where it stopped."""
    root = execution.start(config, set_ or [], run_dir, take_over=take_over, unattended=unattended)
    say(run_summary(existing_run(root)))


def resume(run: RunFolder, set_: Overrides = None, take_over: TakeOver = False) -> None:
    """Go on with a run. Execution keys may change, and `rounds` may grow."""
    execution.resume(run, set_ or [], take_over=take_over)
    say(run_summary(existing_run(run)))


def submit(config: ConfigOrRun, run_dir: RunDir = None, set_: Overrides = None) -> None:
    """Submit the coordinator as a small Slurm job; it submits everything else."""
    root, job = execution.submit(config, set_ or [], run_dir)
    say(f"coordinator job {job}; fedllm status {shlex.quote(str(root))}")


def prepare(config: ConfigFile, set_: Overrides = None, json_: AsJson = False) -> None:
    """Fetch, fingerprint and tokenise, where the network is; everything else runs offline."""
    from fedllm.steps.prepare import describe_way
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
    answers = sum(client.cut_answers for client in prepared.clients)
    prompts = sum(client.truncated_rows for client in prepared.clients) - answers
    dropped = sum(client.dropped_rows for client in prepared.clients)
    cutoff = loaded.data.cutoff_tokens
    say(f"{prompts:,} prompts and {answers:,} answers cut at data.cutoff_tokens: {cutoff}")
    say(f"{dropped:,} rows dropped without an answer")
    say(describe_way(prepared.way))


def advance(
    run: ConfigOrRun,
    run_dir: RunDir = None,
    json_: AsJson = False,
    chained: Annotated[
        bool, typer.Option("--chained", help="As a Slurm job that leaves a successor waiting.")
    ] = False,
) -> None:
    """Take the steps that are possible now and return: for cron, or by hand."""
    if chained:
        say("done" if execution.advance_link(run) else "not done yet")
        return
    try:
        done = execution.advance_run(run, run_dir)
    except LeaseError as error:
        # as usual from cron as a step that is not possible yet
        say(str(error))
        raise typer.Exit(3) from error
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
    config = read_config(paths.config)
    if not jobs_only:
        told = [*_end_jobs(paths, config), *_end_holder(paths)]
        say("\n".join(told) or "no coordinator is at work")
    scheduler = execution.make_scheduler(paths, config)
    try:
        ended = cancel_jobs(paths, config, scheduler)
    finally:
        scheduler.close()
    say(f"{ended} tasks cancelled" if ended else "no task was at work")


def _end_jobs(paths: RunPaths, config: Config) -> Iterator[str]:
    """End the jobs that coordinate or will, until none is left: a link submits another."""
    if not traits_of(config).jobs_outlive_coordinator:
        return
    run_id = RunRecord.read(paths.run).run_id
    while jobs := list(coordinator_jobs(run_id)):
        # the last first: a successor starts when the one before it ends
        for job in reversed(jobs):
            yield _end_job(job)


def _end_job(job: str) -> str:
    cancel_job(job)
    _await_end(partial(job_is_gone, job))
    return f"coordinator job {job} cancelled"


def _end_holder(paths: RunPaths) -> Iterator[str]:
    """End who holds the run, a job that was submitted by hand or a process."""
    number, holder = highest(paths)
    if holder is None or paths.released(number).exists():
        return
    if holder.slurm_job:
        if not job_is_gone(holder.slurm_job):
            yield _end_job(holder.slurm_job)
        return
    gone = process_is_gone(holder)
    if gone is None:
        yield f"coordinator {number} is on {holder.host}, pid {holder.pid}: end it there"
    elif not gone:
        os.kill(holder.pid, signal.SIGTERM)
        _await_end(partial(process_is_gone, holder))
        yield f"coordinator {number} (pid {holder.pid}) told to stop"


def _await_end(is_gone: Callable[[], bool | None]) -> None:
    """Wait for a coordinator that was told to stop: until then it may submit more."""
    pause = Backoff(0.1, max_seconds=_LONGEST_PAUSE_SECONDS)
    while not is_gone() and pause.seconds < _LONGEST_PAUSE_SECONDS:
        time.sleep(pause.seconds)
        pause.fail()
