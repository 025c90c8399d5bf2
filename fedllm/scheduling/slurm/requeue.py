"""A task of an array starts itself again: Slurm requeues what it preempts, not what runs out."""

import subprocess

_PATIENCE_SECONDS = 30.0


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
