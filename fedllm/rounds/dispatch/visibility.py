"""Visibility of a run directory from compute nodes, judged by jobs that failed without a log."""

from collections.abc import Mapping
from pathlib import Path

from fedllm.scheduling.endings import reason_of
from fedllm.scheduling.log_names import has_log
from fedllm.scheduling.seam import Ending, EndReason


def blind_nodes(endings: Mapping[str, Ending], logs: Path) -> list[str]:
    """Return nodes on which a task failed before it could open its log in `logs`.

    Slurm opens the log before the first line of a job runs, so a failed task without a log could
    not reach the folder. Call this only after `storage.visibility_seconds`, when whatever those
    nodes wrote must be visible here.
    """
    return sorted(
        {
            ending.node
            for task, ending in endings.items()
            # a task that was cancelled in the queue leaves no log either
            if reason_of(ending) is EndReason.FAILED and ending.node and not has_log(logs, task)
        }
    )


def visibility_problem(
    root: Path, kind: str, endings: Mapping[str, Ending], logs: Path
) -> str | None:
    """Return the problem in one line if nodes cannot see the run directory `root`, else None."""
    nodes = blind_nodes(endings, logs)
    if not nodes:
        return None
    return (
        f"{root}: node {', '.join(nodes)} cannot see it (the {kind} job failed there at once and "
        "could not open its log); put runs on storage that all compute nodes share (--run-dir), "
        "and check it with: fedllm doctor --run-dir DIR"
    )
