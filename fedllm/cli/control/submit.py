"""`fedllm submit`: submit the coordinator as a Slurm job."""

import shlex

from fedllm.cli import execution
from fedllm.cli.options import (
    AcceptChanges,
    ConfigOrRun,
    Overrides,
    RunDir,
    say,
)


def submit(
    config: ConfigOrRun,
    run_dir: RunDir = None,
    set_: Overrides = None,
    accept_changes: AcceptChanges = False,
) -> None:
    """Submit the coordinator as a small Slurm job. It submits all other jobs."""
    root, job = execution.submit(config, set_ or [], run_dir, accept_changes=accept_changes)
    say(f"coordinator job {job}; fedllm status {shlex.quote(str(root))}")
