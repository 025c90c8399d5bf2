"""The status of a run as text for people."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from fedllm.errors import counted
from fedllm.reporting.status.attempt_tasks import GONE, AttemptStatus, TaskStatus
from fedllm.reporting.status.failure import Failure
from fedllm.reporting.status.pace import Estimate, Pace
from fedllm.reporting.status.queue import WHO_SUSPENDS, QueueStatus
from fedllm.reporting.status.same_reasons import reason_line, same_reasons
from fedllm.reporting.status.status import (
    FAILED,
    FailedClient,
    RoundStatus,
    RoundTraining,
    RunResults,
    RunStatus,
)
from fedllm.reporting.tables import size, text_table
from fedllm.storage.kept_records import duration
from fedllm.storage.paths import shown_path
from fedllm.storage.records import training_text

_MAX_TASKS = 24
_MAX_FAILED = 10
_TIER_ROUNDS = 3


def status_text(root: Path, status: RunStatus, *, now: float | None = None) -> str:
    """Return the status of a run, in lines.

    Args:
        root: the run directory as the user named it.
        status: the status.
        now: the time in seconds since the epoch; default: the present.
    """
    return "\n".join(_lines(root, status, time.time() if now is None else now))


def headline(status: RunStatus) -> str:
    """Return the most important line of a status."""
    text = _run_line(status)
    if status.current and status.current.cohort:
        text += f"; {_round_line(status.current)}"
    return text


def _run_line(status: RunStatus) -> str:
    done = f"{status.rounds_done} of {counted(status.rounds, 'round')}"
    return f"run {status.run_id}: {status.state}, {done}"


def _lines(root: Path, status: RunStatus, now: float) -> Iterator[str]:
    yield _run_line(status)
    yield f"coordinator: {status.coordinator}"
    if not status.prepared:
        yield "prepare: not complete"
    elif status.current:
        yield from _round_lines(status.current, goes_on=status.state not in {FAILED, "stopped"})
    others = [str(n) for n in status.evaluating if not status.current or n != status.current.round]
    if others:
        yield f"evaluation under way: round {', '.join(others)}"
    if status.queue:
        yield from _queue_lines(status.queue)
    yield from _recent_lines(status.recent)
    yield from _result_lines(status)
    if status.task_hours:
        yield _usage_line(status)
    if status.estimate and status.state not in {"done", FAILED}:
        yield _end_line(status.estimate, now, running=status.state == "running")
    yield from _next_lines(root, status)


def _result_lines(status: RunStatus) -> Iterator[str]:
    if status.training:
        yield _tier_table(status.training)
        stages = [f"{name} {duration(s)}" for name, s in status.training.stages.items()]
        if stages:
            yield f"stages of round {status.training.round}: {', '.join(stages)}"
    if status.results:
        yield _results_table(status.results)


def _next_lines(root: Path, status: RunStatus) -> Iterator[str]:
    name = shlex.quote(str(root))
    if status.failure:
        yield from _failure_lines(status.failure)
    elif status.state == "stopped":
        yield f"go on with: fedllm resume {name}"
    elif status.state == "done":
        yield f"next:\n  fedllm export {name} --out adapter\n  fedllm report {name}"


def _round_line(current: RoundStatus) -> str:
    failed = len(current.failed)
    parts = [f"{current.published - failed} of {counted(current.cohort, 'client')} published"]
    if current.step == "train" and current.published < current.cohort:
        parts += [f"{current.claimed} at work", f"{current.waiting} waiting"]
    if failed:
        parts.append(f"{failed} failed")
    if current.enough < current.cohort:
        parts.append(f"quorum {current.enough}")
    return f"round {current.round}: {current.step}; {', '.join(parts)}"


def _round_lines(current: RoundStatus, *, goes_on: bool) -> Iterator[str]:
    if not current.cohort:
        yield f"round {current.round}: {current.step}"
        return
    yield _round_line(current)
    if goes_on and current.pace and current.pace.clients and current.step == "train":
        yield f"  {_speed(current.pace)}, for {duration(current.pace.seconds)}"
    for attempt in current.attempts:
        yield from _attempt_lines(attempt)
    yield from _failed_lines(current.failed)
    gone = [task for task in current.tasks if task.state == GONE]
    if gone:
        held = counted(sum(task.held for task in gone), "client")
        tasks = counted(len(gone), "task")
        yield f"  {tasks} ended before all was published; to train again: {held}"
    if at_work := tuple(task for task in current.tasks if task.state != GONE):
        yield _task_table(at_work)


def _failed_lines(failed: tuple[FailedClient, ...]) -> Iterator[str]:
    by_client = {each.client: each for each in failed}
    reasons = same_reasons({each.client: each.reason for each in failed})
    for reason, clients in list(reasons.items())[:_MAX_FAILED]:
        first = by_client[clients[0]]
        place = f" on {first.node}" if first.node and len(clients) == 1 else ""
        log = f" (log {shown_path(Path(first.log))})" if first.log else ""
        yield f"  failed{place} {reason_line(reason, clients)}{log}"
    if len(reasons) > _MAX_FAILED:
        yield f"  ... and {counted(len(reasons) - _MAX_FAILED, 'other reason')}; --json has all"


def _attempt_lines(attempt: AttemptStatus) -> Iterator[str]:
    wave = f"{attempt.tasks_submitted} of {counted(attempt.tasks_wanted, 'task')} submitted"
    if attempt.tasks_adopted:
        wave += f", {attempt.tasks_adopted} reused from the previous round"
    yield (
        f"  attempt {attempt.attempt}: {wave}, "
        f"{attempt.bundles_claimed} of {counted(attempt.bundles, 'bundle')} claimed"
    )
    for ending in attempt.endings:
        place = f" on {', '.join(ending.nodes)}" if ending.nodes else ""
        log = f" (log {shown_path(Path(ending.log))})" if ending.log else ""
        yield f"    {ending.tasks} ended {ending.state}{place}{log}"
    for why, tasks in attempt.cancelled.items():
        yield f"    {tasks} ended by fedllm: {why}"
    for error in attempt.errors:
        yield f"    error: {error}"
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
            shown_path(Path(task.log)) if task.log else "",
        ]
        for task in tasks[:_MAX_TASKS]
    ]
    header = ["task", "node", "state", "client", "step", "done", "held", "for", "log"]
    table = text_table("tasks at work", header, rows)
    hidden = len(tasks) - _MAX_TASKS
    return table + (f"\n... and {hidden} more; --json has all" if hidden > 0 else "")


def _queue_lines(queue: QueueStatus) -> Iterator[str]:
    if queue.problem:
        yield f"queue: {queue.problem}; the rest is from the run's files"
    for array in queue.arrays:
        yield f"{array.name}: {array.running} running, {array.waiting} waiting"
        if array.suspended:
            yield f"  {array.suspended} suspended: {WHO_SUSPENDS}"
        for reason in array.reasons:
            advice = f": {reason.advice}" if reason.advice else ""
            yield f"  {reason.tasks} wait for {reason.reason}{advice}"


def _recent_lines(recent: tuple[Pace, ...]) -> Iterator[str]:
    for pace in recent[-_TIER_ROUNDS:]:
        mix = ", ".join(f"{t} {m.used}/{m.drawn}" for t, m in pace.tiers.items())
        efficiency = _percent(pace.array_efficiency)
        yield (
            f"round {pace.round} took {duration(pace.seconds)}: {_speed(pace)}"
            + (f", tasks trained {efficiency} of their time" if efficiency else "")
            + ("" if pace.training_loss is None else f"; training loss {pace.training_loss:.3f}")
            + (f"; clients used of drawn: {mix}" if mix else "")
        )


def _tier_table(training: RoundTraining) -> str:
    rows = [
        [
            tier.tier,
            str(tier.rank),
            str(tier.clients),
            _arrow(tier.first_loss, tier.last_loss),
            f"{tier.seconds:.1f} s" if tier.seconds < 90 else duration(tier.seconds),
            size(tier.peak_memory_bytes),
            size(tier.bytes_up),
        ]
        for tier in training.tiers
    ]
    header = ["tier", "rank", "clients", "training loss", "time", "peak memory", "sends"]
    title = f"training in round {training.round}, first step -> last step, means of clients"
    return text_table(title, header, rows)


def _results_table(results: RunResults) -> str:
    rows = [
        [
            group,
            str(mean.clients),
            *(
                _arrow(getattr(results.first.get(group), name, None), getattr(mean, name))
                for name in ("loss", "rouge_l", "exact_match")
            ),
        ]
        for group, mean in results.last.items()
    ]
    title = f"scores on test rows, round {results.first_round} -> round {results.last_round}"
    return text_table(title, ["clients", "number", "answer loss", "Rouge-L", "exact match"], rows)


def _failure_lines(failure: Failure) -> Iterator[str]:
    where = f"round {failure.round}"
    # the message may begin with the round itself
    message = failure.message.removeprefix(f"{where}: ")
    yield f"failed in {failure.step}{f' of {where}' if failure.round else ''}: {message}"
    if failure.log and failure.log not in failure.message:
        yield f"log: {failure.log}"
    yield f"remedy: {failure.remedy}"


def _arrow(first: float | None, last: float | None) -> str:
    return "-" if first is None or last is None else f"{first:.3f} -> {last:.3f}"


def _speed(pace: Pace) -> str:
    return f"{pace.clients_per_minute:.1f} clients/min, {pace.tokens_per_second:,.0f} tokens/s"


def _usage_line(status: RunStatus) -> str:
    text = f"used: {status.task_hours:.2f} task hours"
    if status.gpu_hours:
        text += f", {status.gpu_hours:.2f} GPU hours"
    efficiency = _percent(status.array_efficiency)
    return text + (f"; tasks trained {efficiency} of their time" if efficiency else "")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _end_line(estimate: Estimate, now: float, *, running: bool) -> str:
    if not running:
        return f"work left: {duration(estimate.seconds)} ({estimate.how})"
    clock_time = time.strftime("%a %H:%M", time.localtime(now + estimate.seconds))
    return f"estimated end: in {duration(estimate.seconds)}, {clock_time} ({estimate.how})"
