"""`fedllm plan`: print what a configuration would submit, and submit nothing."""

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli import execution
from fedllm.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    configuration,
    fresh_folder,
    say,
    say_json,
)
from fedllm.reporting.plan.plan_text import describe_plan
from fedllm.rounds.dispatch.planned import plan_run
from fedllm.scheduling.log_names import script_of
from fedllm.scheduling.slurm.sbatch_flags import refuse_reserved
from fedllm.storage.paths import RunPaths, cache_of
from fedllm.storage.publishing.publish import publish_bytes


def plan(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the sbatch files here.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", metavar="N", min=1, help="Plan for N free slots."),
    ] = None,
    set_: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Print the jobs, costs and times of a round. Nothing is submitted."""
    from fedllm.programs.prepare import prepare as prepare_step

    loaded = configuration(config, set_ or [])
    refuse_reserved(loaded.scheduler)
    if out is not None:
        fresh_folder(out)
    root = execution.default_run_dir(config)
    prepared = prepare_step(loaded, cache_of(loaded.storage.cache, root))
    run = RunPaths(root=root.resolve())
    with closing(execution.make_scheduler(run, loaded)) as scheduler:
        planned = plan_run(loaded, prepared, run, scheduler, slots=slots)
    if json_:
        say_json(dataclasses.asdict(planned.geometry))
    else:
        say(describe_plan(planned.geometry))
    if out is None:
        return
    for script in planned.scripts:
        file = script_of(out, script.job.name)
        publish_bytes(file, script.text.encode())
        if not json_:
            say(f"wrote {file}")
