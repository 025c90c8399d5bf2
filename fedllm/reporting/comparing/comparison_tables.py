"""A comparison as tables: arms, these models, these methods, categories."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedllm.reporting.comparing.questions import (
    FEWEST_SEEDS,
    Answer,
    Answers,
    CategoryAnswer,
    answer,
    worst_tenth,
)
from fedllm.reporting.comparing.scored_runs import ScoredArms, ScoredRun
from fedllm.reporting.comparing.spending import (
    budgets_of,
    common_amount,
    parameters_per_client,
    value_within,
)
from fedllm.reporting.tables import number, text_table
from fedllm.statistics.intervals import Interval
from fedllm.statistics.paired_tests import PairedTest

_ROLES = {"secondary": "", "noise floor": "noise floor"}
# why a row has no test
_UNTESTED = {"category": "too few clients", "kind of tasks": "not tested"}


@dataclass(frozen=True, kw_only=True)
class ArmRow:
    """An arm: its primary endpoint over seeds, its worst clients, and quality at equal spending.

    `within` maps a budget, with its common amount, to the mean of the last round within it; None:
    no evaluated round is.
    """

    arm: str
    seeds: tuple[int, ...]
    parameters_per_client: float
    mean: float
    deviation: float | None
    worst_tenth: float
    within: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison, complete: what `fedllm compare` prints and `--json` holds.

    `base` is the endpoint of the untouched base; None: it was not evaluated.
    """

    endpoint: str
    last_rounds: int
    primary_is_named: bool
    arms: tuple[ArmRow, ...]
    answers: Answers
    left_out: tuple[str, ...]
    base: float | None
    roots: Mapping[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as values that JSON can represent."""
        return asdict(self)


def comparison_of(scored: ScoredArms) -> Comparison:
    """Compare scored arms."""
    return Comparison(
        endpoint=scored.comparison.endpoint,
        last_rounds=scored.comparison.last_rounds,
        primary_is_named=scored.is_named,
        arms=tuple(_arm_rows(scored)),
        answers=answer(scored),
        left_out=scored.left_out,
        base=_base(scored),
        roots={arm: tuple(str(run.root) for run in runs) for arm, runs in scored.arms.items()},
    )


def _base(scored: ScoredArms) -> float | None:
    first = next(iter(scored.arms.values()))[0]
    return next((spent.value for spent in first.spent if not spent.round), None)


def _arm_rows(scored: ScoredArms) -> list[ArmRow]:
    spent = {arm: [run.spent for run in runs] for arm, runs in scored.arms.items()}
    budgets = budgets_of([rounds for runs in spent.values() for rounds in runs])
    amounts = {budget: common_amount(list(spent.values()), budget) for budget in budgets}
    rows = []
    for arm, runs in scored.arms.items():
        means = [_mean(run, scored.comparison.endpoint) for run in runs]
        rows.append(
            ArmRow(
                arm=arm,
                seeds=tuple(run.seed for run in runs),
                parameters_per_client=parameters_per_client(spent[arm]),
                mean=statistics.fmean(means),
                deviation=statistics.stdev(means) if len(means) > 1 else None,
                worst_tenth=worst_tenth(runs, scored.comparison.endpoint),
                within={
                    f"{amount:.3g} {budget.unit}": value_within(spent[arm], budget, amount)
                    for budget, amount in amounts.items()
                },
            )
        )
    return rows


def _mean(run: ScoredRun, endpoint: str) -> float:
    return statistics.fmean(run.values[endpoint].values())


def comparison_text(comparison: Comparison) -> str:
    """Return the comparison as text."""
    answers = comparison.answers
    parts = [
        _arms_table(comparison),
        _answers_table(
            "THESE MODELS: differences per client, averaged over seeds (for new clients, not for "
            "new seeds)",
            answers.models,
            ("clients", "signed ranks p"),
            comparison.primary_is_named,
        ),
        _answers_table(
            "THESE METHODS: differences per seed (for new seeds and clients)",
            answers.methods,
            ("seeds", "sign flips p"),
            comparison.primary_is_named,
        ),
        _categories_table(comparison, comparison.answers.categories, "category"),
        _categories_table(comparison, comparison.answers.kinds, "kind of tasks"),
        _notes(comparison),
    ]
    return "\n\n".join(part for part in parts if part)


def _arms_table(comparison: Comparison) -> str:
    budgets = list(comparison.arms[0].within)
    rows = [
        [
            row.arm,
            str(len(row.seeds)),
            f"{row.parameters_per_client:,.0f}" if row.parameters_per_client else "-",
            number(row.mean) + ("" if row.deviation is None else f" +- {row.deviation:.3f}"),
            number(row.worst_tenth),
            *("-" if value is None else number(value) for value in row.within.values()),
        ]
        for row in comparison.arms
    ]
    title = f"{comparison.endpoint}, mean over clients as deployed, over the last " + (
        "evaluation" if comparison.last_rounds == 1 else f"{comparison.last_rounds} evaluations"
    )
    if comparison.base is not None:
        title += f"; untouched base {number(comparison.base)}"
    header = ["arm", "seeds", "parameters", "mean +- sd of seeds", "worst tenth"]
    return text_table(title, [*header, *(f"at {budget}" for budget in budgets)], rows)


def _answers_table(
    title: str, answers: Sequence[Answer], words: tuple[str, str], is_named: bool
) -> str:
    count, test = words
    roles = {**_ROLES, "primary": "primary" if is_named else ""}
    rows = [
        [
            " - ".join(a.contrast),
            roles[a.role],
            a.endpoint,
            str(a.count),
            _signed(a.difference),
            _interval(a.interval),
            _p(a.test, None) if a.test else a.why,
            _p(a.test, a.adjusted) if a.test else "",
        ]
        for a in answers
    ]
    header = ["contrast", "", "endpoint", count, "difference", "95 % interval", test, "adjusted"]
    # without a named contrast, or without a test, a column is empty
    kept = [n for n in range(len(header)) if any(row[n] for row in rows)]
    return text_table(title, [header[n] for n in kept], [[row[n] for n in kept] for row in rows])


def _categories_table(comparison: Comparison, answers: Sequence[CategoryAnswer], what: str) -> str:
    if not answers:
        return ""
    rows = [
        [
            a.category or "(none)",
            str(a.clients),
            _signed(a.difference),
            "-" if a.noise is None else _signed(a.noise),
            _p(a.test, a.adjusted) if a.test else _UNTESTED[what],
        ]
        for a in answers
    ]
    title = f"{' - '.join(comparison.answers.models[0].contrast)}: {comparison.endpoint} by {what}"
    return text_table(title, [what, "clients", "difference", "noise floor", "adjusted p"], rows)


def _notes(comparison: Comparison) -> str:
    notes = [
        "A difference below zero: the first arm has the lower loss, or the lower score.",
        "Intervals are percentiles of 2,000 bootstrap samples; with few seeds they are too narrow.",
        "Adjusted: by Holm, "
        + (
            "all but the primary contrast and endpoint."
            if comparison.primary_is_named
            else "all, since no sweep's file names a primary contrast."
        ),
    ]
    if any(len(row.seeds) < FEWEST_SEEDS for row in comparison.arms):
        notes.append(f"A claim about methods takes {FEWEST_SEEDS} common seeds of both arms.")
    notes += [f"left out: {reason}" for reason in comparison.left_out]
    return "\n".join(notes)


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:+.3f} to {interval.high:+.3f}"


def _p(test: PairedTest | None, adjusted: float | None) -> str:
    """Return a p-value, with the smallest that its test can give where it is that one."""
    assert test is not None
    value = test.p if adjusted is None else adjusted
    text = f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"
    return f"{text} (least)" if adjusted is None and test.p <= test.smallest else text
