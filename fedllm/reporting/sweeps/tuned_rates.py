"""Tuned learning rates: what every arm's tuning runs scored on dev clients, and the best rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.config.loading import read_config, validate
from fedllm.config.models import Config
from fedllm.planning.sweeps.sweep_runs import best_rate
from fedllm.reporting.results.metrics import by_group
from fedllm.reporting.tables import number, text_table
from fedllm.storage.paths import SweepPaths
from fedllm.storage.records import EvaluationRecord
from fedllm.storage.sweep_records import SweepRecord, SweepRunRecord


@dataclass(frozen=True, kw_only=True)
class TunedRate:
    """The tuning of an arm: rate -> dev loss (None: not done yet), and the best of all rates.

    `best` is None until every rate is done, and if none has a finite loss.
    """

    arm: str
    losses: dict[float, float | None]
    best: float | None

    @property
    def is_done(self) -> bool:
        """Whether every rate has been tried."""
        return None not in self.losses.values()


def tuned_rate(paths: SweepPaths, record: SweepRecord, arm: str) -> TunedRate:
    """Return the tuning of an arm, so far.

    The loss is the mean over dev clients after the last round; one that is not finite is as bad as
    can be.
    """
    losses: dict[float, float | None] = {}
    for run in record.tuning_of(arm):
        assert run.rate is not None, "a tuning run tries a rate"
        losses[run.rate] = _dev_loss(paths, run)
    done = {rate: loss for rate, loss in losses.items() if loss is not None}
    best = best_rate(done) if len(done) == len(losses) else None
    return TunedRate(arm=arm, losses=losses, best=best)


def tuned_rates(paths: SweepPaths, record: SweepRecord) -> list[TunedRate]:
    """Return the tuning of every arm that has one."""
    return [tuned_rate(paths, record, arm) for arm in record.arms() if record.tuning_of(arm)]


def present_config(paths: SweepPaths, run: SweepRunRecord) -> Config:
    """Return the configuration of a run: its own once it was begun, for it may stop early."""
    own = paths.run(run.name).config
    return read_config(own) if own.exists() else validate(run.config)


def _dev_loss(paths: SweepPaths, run: SweepRunRecord) -> float | None:
    last = paths.run(run.name).round(present_config(paths, run).rounds)
    if not last.record.exists():
        return None
    record = EvaluationRecord.read(last.evaluation_record)
    dev = by_group(record.clients).get("dev")
    return dev.loss if dev and math.isfinite(dev.loss) else math.inf


def rates_table(tuned: Sequence[TunedRate]) -> str:
    """Return the grid of learning rates with every arm's dev losses; empty without tuning."""
    if not tuned:
        return ""
    rates = sorted({rate for each in tuned for rate in each.losses})
    rows = [
        [each.arm, *(_cell(each.losses.get(rate), rate == each.best) for rate in rates)]
        for each in tuned
    ]
    title = "answer loss of dev clients by learning rate, equal budget (* chosen)"
    return text_table(title, ["arm", *(f"{rate:g}" for rate in rates)], rows)


def _cell(loss: float | None, is_best: bool) -> str:
    return "-" if loss is None else number(loss) + ("*" if is_best else "")
