"""History of a run: its training loss and its scores, round by round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedllm.reporting.results.metrics import Mean, by_group
from fedllm.reporting.status.record_heads import CollectionHead
from fedllm.storage.paths import RoundPaths
from fedllm.storage.record_cache import RecordCache
from fedllm.storage.records import EvaluationRecord

_BARS = "▁▂▃▄▅▆▇█"
_MAX_ROUNDS = 24


@dataclass(frozen=True, kw_only=True)
class RoundScores:
    """The scores of one round as deployed, by group, and of how many rows they are."""

    round: int
    rows: Mapping[str, int]
    groups: Mapping[str, Mean]

    def is_like(self, other: "RoundScores", group: str) -> bool:
        """Return whether both scored as many clients and rows of a group, so the same ones."""
        mine, theirs = self.groups[group], other.groups[group]
        return (mine.clients, self.rows[group]) == (theirs.clients, other.rows[group])


@dataclass(frozen=True, kw_only=True)
class History:
    """The training loss of the newest rounds, and the scores of all that were evaluated."""

    training_losses: Mapping[int, float]
    scores: tuple[RoundScores, ...]

    def comparable(self, group: str) -> list[tuple[int, Mean]]:
        """Return the rounds whose scores of a group are of the same rows as its newest ones."""
        known = [each for each in self.scores if group in each.groups]
        return [(s.round, s.groups[group]) for s in known if s.is_like(known[-1], group)]


NO_HISTORY = History(training_losses={}, scores=())


def history_of(records: RecordCache, rounds: Sequence[RoundPaths]) -> History:
    """Return the history of a run."""
    losses: dict[int, float] = {}
    for paths in [r for r in rounds if r.number][-_MAX_ROUNDS:]:
        collection = records.find(CollectionHead, paths.collection)
        loss = collection.training.get("training_loss") if collection else None
        if isinstance(loss, float):
            losses[paths.number] = loss
    evaluations = (records.find(EvaluationRecord, r.evaluation_record) for r in rounds)
    return History(
        training_losses=losses,
        scores=tuple(_scores(record) for record in evaluations if record),
    )


def _scores(record: EvaluationRecord) -> RoundScores:
    rows: dict[str, int] = {}
    for client in record.clients:
        rows[client.group] = rows.get(client.group, 0) + client.as_deployed.rows
    return RoundScores(round=record.round, rows=rows, groups=by_group(record.clients))


def sparkline(values: Sequence[float]) -> str:
    """Return a bar for each value: the lowest is the smallest bar."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if not low < high:
        return _BARS[len(_BARS) // 2] * len(values)
    steps = len(_BARS) - 1
    return "".join(_BARS[round(steps * (value - low) / (high - low))] for value in values)
