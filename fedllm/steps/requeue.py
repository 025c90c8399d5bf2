"""A task of an array starts itself again: Slurm requeues what it preempts, not what runs out."""

import os
import subprocess
from collections.abc import Mapping

_PATIENCE_SECONDS = 30.0


def is_array_task(task: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Say whether this process is a task of an array that fedllm submitted.

    Not so within an allocation of the user's own: requeueing that would restart more than us.
    """
    array, number = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return bool(array) and task == environment.get("FEDLLM_TASK") == f"{array}_{number}"


def requeue(task: str) -> str | None:
    """Have Slurm start array task `task` again, which ends it; return None, or why it cannot be.

    By array and index: the job id of an array's first task stands for the whole array.
    """
    try:
        done = subprocess.run(
            ["scontrol", "requeue", task],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return "no scontrol here"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[0] if said else f"scontrol: exit code {done.returncode}"
