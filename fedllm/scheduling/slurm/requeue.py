"""Requeueing by the task itself: Slurm requeues a preempted task, not one that runs out of time."""

import subprocess

_TIMEOUT_SECONDS = 30.0


def requeue(task: str) -> str | None:
    """Have Slurm start array task `task` again, which ends it; return why that failed, or None.

    `task` is array and index, because the job id of an array's first task means the whole array.
    """
    try:
        done = subprocess.run(
            ["scontrol", "requeue", task],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        return "no scontrol here"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[0] if lines else f"scontrol: exit code {done.returncode}"
