"""`fedllm submit`: submit the coordinator as a Slurm job."""

import shlex
from pathlib import Path

from fedllm.cli import execution
from fedllm.cli.options import (
    AcceptChanges,
    AnyStart,
    Overrides,
    RunDir,
    configuration_file,
    say,
)
from fedllm.cli.sweeps import (
    create_sweep,
    default_sweep_dir,
    existing_sweep,
    planned_sweep,
    submit_sweep,
)
from fedllm.config.sweep_files import is_sweep_file
from fedllm.errors import ConfigError
from fedllm.storage.paths import SweepPaths


def submit(
    config: AnyStart,
    run_dir: RunDir = None,
    set_: Overrides = None,
    accept_changes: AcceptChanges = False,
) -> None:
    """Submit the coordinator as a small Slurm job. It submits all other jobs.

    For a sweep, one coordinator runs everything side by side, under one limit of queued tasks.
    """
    sweep = _sweep(config, run_dir)
    if sweep is None:
        root, job = execution.submit(config, set_ or [], run_dir, accept_changes=accept_changes)
    else:
        if set_:
            raise ConfigError("--set: a sweep has many configurations; change its file")
        root = run_dir or (config if config.is_dir() else default_sweep_dir(config))
        job = submit_sweep(sweep, accept_changes=accept_changes)
    say(f"coordinator job {job}; fedllm status {shlex.quote(str(root))}")


def _sweep(given: Path, folder: Path | None) -> SweepPaths | None:
    """Return the sweep that is given, whose folder is made if its file is; None: it is none."""
    if given.is_dir():
        return existing_sweep(given)
    file = configuration_file(given)
    if not is_sweep_file(file):
        return None
    root = folder or default_sweep_dir(file)
    _, runs = planned_sweep(file, root)
    execution.require_cluster(runs[0].config, "sweep", given)
    return create_sweep(file, root)
