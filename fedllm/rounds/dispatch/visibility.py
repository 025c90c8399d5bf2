"""A run directory that compute nodes cannot see: told by jobs that failed without a log."""

from collections.abc import Mapping
from pathlib import Path

from fedllm.scheduling.endings import reason_of
from fedllm.scheduling.log_names import has_log
from fedllm.scheduling.seam import Ending, EndReason


def blind_nodes(endings: Mapping[str, Ending], logs: Path) -> list[str]:
    """Return the nodes on which a task failed before it could open its log in `logs`.

    A log is opened before the first line of a job runs: a failed task without one could not reach
    the folder. To be asked once what those nodes wrote must be visible here.
    """
    return sorted(
        {
            ending.node
            for task, ending in endings.items()
            # one that was cancelled in the queue leaves no log either
            if reason_of(ending) is EndReason.FAILED and ending.node and not has_log(logs, task)
        }
    )


def visibility_problem(
    root: Path, kind: str, endings: Mapping[str, Ending], logs: Path
) -> str | None:
    """Return one line when nodes could not see the run directory `root`, else None."""
    nodes = blind_nodes(endings, logs)
    if not nodes:
        return None
    return (
        f"{root}: node {', '.join(nodes)} cannot see it (the {kind} job failed there at once and "
        "could not open its log); put runs on storage that all compute nodes share (--run-dir), "
        "and look at it with: fedllm doctor --run-dir DIR"
    )
