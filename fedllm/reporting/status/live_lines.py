"""Lines of the live view of a run: what it does now, how far it is, and how well it does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fedllm.errors import counted
from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.status.history import NO_HISTORY, History, sparkline
from fedllm.reporting.status.pace import Estimate
from fedllm.reporting.status.status import RoundStatus, RunStatus
from fedllm.storage.kept_records import duration

_LABEL = 11
_BAR = 20
# how much later than the run's estimate a round may end by its own pace
_SLOWER_SECONDS = 60.0
_WAITS = {
    "state": "makes the state before training",
    "aggregate": "aggregates",
    "evaluate": "scores",
}
_STEPS = {"prepare": "prepare", "aggregate": "aggregate", "evaluate": "score"}


@dataclass(frozen=True, kw_only=True)
class LiveLine:
    """A line: its label, the share that is done (None: there is no bar), and the rest in words.

    The most important words come first.
    """

    label: str
    share: float | None = None
    words: tuple[str, ...] = ()


def live_lines(status: RunStatus) -> list[LiveLine]:
    """Return the lines that describe a run now, the narrowest step first."""
    current = status.current
    lines = [
        LiveLine(
            label=_STEPS[job.step]
            + (f" {job.round}" if job.round or job.step == "evaluate" else ""),
            share=job.done / max(1, job.total),
            words=tuple(job.text.split(", ")),
        )
        for job in status.jobs
    ]
    if current and current.cohort and current.step == "train":
        lines.insert(0, _round_line(current, status.estimate))
    if not status.prepared and not lines:
        lines.append(LiveLine(label="prepare", words=("a worker starts",)))
    if status.prepared and not lines and current and current.step in _WAITS:
        lines.append(LiveLine(label=f"round {current.round}", words=(_WAITS[current.step],)))
    if status.prepared:
        lines.append(_run_line(status))
    return [*lines, *_history_lines(status.history)]


def _round_line(current: RoundStatus, end: Estimate | None) -> LiveLine:
    begun = current.claimed or current.published
    words = [
        f"{current.published} of {counted(current.cohort, 'client')}",
        f"{current.claimed} at work" if begun else "workers start",
    ]
    pace = current.pace
    if pace and current.published:
        left = pace.training_seconds * (current.cohort / current.published - 1)
        words.append(f"{pace.tokens_per_second:,.0f} tokens/s")
        # the pace of a round that lay still tells nothing
        if end is None or left <= end.seconds + _SLOWER_SECONDS:
            words.append(f"{duration(left)} left")
    failed = len(current.failed)
    if failed:
        words.insert(1, f"{failed} failed")
    return LiveLine(
        label=f"round {current.round}",
        share=current.published / max(1, current.cohort),
        words=tuple(words),
    )


def _run_line(status: RunStatus) -> LiveLine:
    words = [f"{status.rounds_done} of {counted(status.rounds, 'round')}"]
    if status.estimate:
        words.append(f"{duration(status.estimate.seconds)} left")
    return LiveLine(label="run", share=status.rounds_done / status.rounds, words=tuple(words))


def _history_lines(history: History) -> Iterator[LiveLine]:
    losses = history.training_losses
    if losses:
        last = max(losses)
        trend = _trend(list(losses.values()))
        yield LiveLine(label="training", words=(f"loss {losses[last]:.3f}{trend}", f"round {last}"))
    groups = history.scores[-1].groups if history.scores else {}
    for group in groups:
        rounds = history.comparable(group)
        number, mean = rounds[-1]
        trend = _trend([each.loss for _, each in rounds])
        where = "base" if number == 0 else f"round {number}"
        words = (f"loss {mean.loss:.3f}{trend}", f"Rouge-L {mean.rouge_l:.3f}", where)
        yield LiveLine(label="scores", words=(f"{GROUP_WORDS[group]} {words[0]}", *words[1:]))


def _trend(values: Sequence[float]) -> str:
    return f" {sparkline(values)}" if len(values) > 1 else ""


def fitted(line: LiveLine, width: int) -> tuple[str, str, str]:
    """Return the label, the bar and the words of a line that fits a width; words drop out whole.

    The bar drops out where it leaves no room for the first words.

    Args:
        line: the line.
        width: the columns of the terminal.
    """
    label = f"{line.label:<{_LABEL}}"[: max(0, width)]
    bar = "" if line.share is None else _bar(line.share, min(_BAR, width // 5))
    room = width - len(label)
    if bar and (text := _whole_words(line.words, room - len(bar) - 1)):
        return label, bar, text
    text = _whole_words(line.words, room)
    return label, "" if text else bar, text


def _whole_words(words: tuple[str, ...], room: int) -> str:
    while words and len(", ".join(words)) > room:
        words = words[:-1]
    return ", ".join(words)


def _bar(share: float, width: int) -> str:
    full = round(width * min(1.0, max(0.0, share)))
    return "█" * full + "░" * (width - full)


def plain_line(status: RunStatus) -> str:
    """Return the present work of a run in one line of a log; empty: nothing is done now."""
    work = [line for line in live_lines(replace(status, history=NO_HISTORY)) if line.label != "run"]
    return "; ".join(f"{line.label}: {', '.join(line.words)}" for line in work)
