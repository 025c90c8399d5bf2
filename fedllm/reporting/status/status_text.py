"""Where a run stands, in lines for people."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from fedllm.reporting.status.attempt_tasks import AttemptStatus, TaskStatus
from fedllm.reporting.status.pace import Estimate, Pace
from fedllm.reporting.status.queue import QueueStatus
from fedllm.reporting.status.status import RoundStatus, RunStatus
from fedllm.reporting.tables import text_table
from fedllm.storage.records import training_text

_MOST_TASKS = 24
_MOST_FAILED = 10
_TIER_ROUNDS = 3


def status_text(root: Path, found: RunStatus, *, now: float | None = None) -> str:
    """Return where a run stands, in lines.

    Args:
        root: the run directory as the user named it.
        found: where it stands.
        now: the time in seconds since the epoch; default: the present.
    """
    return "\n".join(_lines(root, found, time.time() if now is None else now))


def headline(found: RunStatus) -> str:
    """Return the one line that says most."""
    text = f"run {found.run_id}: {found.state}, {found.rounds_done} of {found.rounds} rounds done"
    if found.current and found.current.cohort:
        text += f"; {_round_line(found.current)}"
    return text


def _lines(root: Path, found: RunStatus, now: float) -> Iterator[str]:
    yield f"run {found.run_id}: {found.state}, {found.rounds_done} of {found.rounds} rounds done"
    yield f"coordinator: {found.coordinator}"
    if not found.prepared:
        yield "prepare: not complete"
    elif found.current:
        yield from _round_lines(found.current)
    others = [str(n) for n in found.evaluating if not found.current or n != found.current.round]
    if others:
        yield f"evaluation under way: round {', '.join(others)}"
    if found.queue:
        yield from _queue_lines(found.queue)
    yield from _recent_lines(found.recent)
    if found.task_hours:
        yield _used(found)
    if found.estimate and found.state != "done":
        yield _end(found.estimate, now, running=found.state == "running")
    if found.state == "stopped":
        yield f"go on with: fedllm resume {shlex.quote(str(root))}"


def _round_line(current: RoundStatus) -> str:
    parts = [f"{current.published} of {current.cohort} clients published"]
    if current.step == "train":
        parts += [f"{current.claimed} at work", f"{current.waiting} waiting"]
    if current.failed:
        parts.append(f"{len(current.failed)} failed")
    if current.enough < current.cohort:
        parts.append(f"{current.enough} are enough")
    return f"round {current.round}: {current.step}; {', '.join(parts)}"


def _round_lines(current: RoundStatus) -> Iterator[str]:
    if not current.cohort:
        yield f"round {current.round}: {current.step}"
        return
    yield _round_line(current)
    if current.pace and current.pace.clients and current.step == "train":
        yield f"  {_speed(current.pace)}, for {duration(current.pace.seconds)}"
    for attempt in current.attempts:
        yield from _attempt_lines(attempt)
    for failed in current.failed[:_MOST_FAILED]:
        place = f" on {failed.node}" if failed.node else ""
        log = f" (log {failed.log})" if failed.log else ""
        yield f"  failed {failed.client}{place}: {failed.reason}{log}"
    if len(current.failed) > _MOST_FAILED:
        yield f"  ... and {len(current.failed) - _MOST_FAILED} more failed; --json has all"
    if current.tasks:
        yield _task_table(current.tasks)


def _attempt_lines(attempt: AttemptStatus) -> Iterator[str]:
    wave = f"{attempt.tasks_submitted} of {attempt.tasks_wanted} tasks submitted"
    if attempt.tasks_adopted:
        wave += f", {attempt.tasks_adopted} lingered for it"
    yield (
        f"  attempt {attempt.attempt}: {wave}, "
        f"{attempt.bundles_claimed} of {attempt.bundles} bundles claimed"
    )
    for ending in attempt.endings:
        place = f" on {', '.join(ending.nodes)}" if ending.nodes else ""
        log = f" (log {ending.log})" if ending.log else ""
        yield f"    {ending.tasks} ended {ending.state}{place}{log}"
    for why, tasks in attempt.cancelled.items():
        yield f"    {tasks} ended by fedllm: {why}"
    for error in attempt.errors:
        yield f"    said: {error}"
    if attempt.excluded_nodes:
        yield f"    nodes left out: {', '.join(attempt.excluded_nodes)}"


def _task_table(tasks: tuple[TaskStatus, ...]) -> str:
    rows = [
        [
            task.task,
            task.node,
            task.state,
            training_text(task.client, task.clients),
            str(task.step) if task.client else "",
            str(task.clients_done),
            str(task.held),
            duration(task.seconds) if task.seconds else "",
            task.log,
        ]
        for task in tasks[:_MOST_TASKS]
    ]
    header = ["task", "node", "state", "client", "step", "done", "held", "for", "log"]
    table = text_table("tasks at work", header, rows)
    left = len(tasks) - _MOST_TASKS
    return table + (f"\n... and {left} more; --json has all" if left > 0 else "")


def _queue_lines(queue: QueueStatus) -> Iterator[str]:
    if queue.problem:
        yield f"queue: {queue.problem}; all of this is from the run's files"
    for array in queue.arrays:
        yield f"{array.name}: {array.running} running, {array.waiting} waiting"
        for reason in array.reasons:
            advice = f": {reason.advice}" if reason.advice else ""
            yield f"  {reason.tasks} wait for {reason.reason}{advice}"


def _recent_lines(recent: tuple[Pace, ...]) -> Iterator[str]:
    for pace in recent[-_TIER_ROUNDS:]:
        mix = ", ".join(f"{t} {m.used}/{m.drawn}" for t, m in pace.tiers.items())
        efficiency = _percent(pace.array_efficiency)
        yield (
            f"round {pace.round} took {duration(pace.seconds)}: {_speed(pace)}"
            + (f", busy {efficiency} of the tasks' time" if efficiency else "")
            + (f"; clients used of drawn: {mix}" if mix else "")
        )


def _speed(pace: Pace) -> str:
    return f"{pace.clients_per_minute:.1f} clients/min, {pace.tokens_per_second:,.0f} tokens/s"


def _used(found: RunStatus) -> str:
    text = f"used: {found.task_hours:.2f} task hours, {found.gpu_hours:.2f} GPU hours"
    efficiency = _percent(found.array_efficiency)
    return text + (f", tasks trained for {efficiency} of them" if efficiency else "")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _end(estimate: Estimate, now: float, *, running: bool) -> str:
    if not running:
        return f"work left: {duration(estimate.seconds)} ({estimate.how})"
    at = time.strftime("%a %H:%M", time.localtime(now + estimate.seconds))
    return f"estimated end: in {duration(estimate.seconds)}, {at} ({estimate.how})"


def duration(seconds: float) -> str:
    """Return a time in the two units that matter."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
