"""The status of a sweep as text for people."""

import shlex
from collections import Counter

from fedllm.errors import counted
from fedllm.reporting.sweeps.sweep_status import SweepRunStatus, SweepStatus
from fedllm.reporting.sweeps.tuned_rates import rates_table
from fedllm.reporting.tables import text_table
from fedllm.storage.kept_records import duration


def sweep_headline(status: SweepStatus) -> str:
    """Return the status in one line."""
    counts = Counter(run.state for run in status.runs)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    left = f"; about {duration(status.estimate.seconds)} left" if status.estimate else ""
    return f"sweep {status.root}: {counted(len(status.runs), 'run')}: {states}{left}"


def sweep_status_text(status: SweepStatus) -> str:
    """Return the status as text."""
    rows = [
        [run.name, run.state, f"{run.rounds_done}/{run.rounds}", _seconds(run)]
        for run in status.runs
    ]
    parts = [
        sweep_headline(status),
        text_table("runs", ["run", "state", "rounds", "a round"], rows),
        rates_table(status.tuned),
    ]
    parts += [f"{run.name}: {run.problem}" for run in status.runs if run.problem]
    if status.estimate:
        parts.append(f"estimate: {duration(status.estimate.seconds)}, {status.estimate.how}")
    parts.append(_next_line(status))
    return "\n\n".join(part for part in parts if part)


def _next_line(status: SweepStatus) -> str:
    root = shlex.quote(status.root)
    if status.state == "done":
        return f"next: fedllm compare {root}"
    if status.state == "running":
        return f"it runs; to follow it: fedllm status {root} --watch"
    return f"next: fedllm resume {root}"


def _seconds(run: SweepRunStatus) -> str:
    return "-" if run.round_seconds is None else duration(run.round_seconds)
