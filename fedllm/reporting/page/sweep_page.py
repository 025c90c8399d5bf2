"""The report of a sweep: its arms over rounds with their seeds, and what they differ in."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fedllm.config.loading import validate
from fedllm.config.sweep_files import endpoint_parts
from fedllm.errors import FedllmError
from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.comparing.comparison_tables import Comparison, comparison_of
from fedllm.reporting.comparing.questions import Answer
from fedllm.reporting.comparing.scored_runs import read_scored_arms
from fedllm.reporting.comparing.spending import (
    BYTES,
    CLIENT_SECONDS,
    GPU_SECONDS,
    Budget,
    SpentRound,
    spent_rounds,
)
from fedllm.reporting.page.contents import (
    Band,
    Chart,
    Fact,
    IntervalChart,
    LineChart,
    PageSection,
    Point,
    Report,
    table_of,
)
from fedllm.reporting.results.run_rows import Row
from fedllm.reporting.sweeps.sweep_status import SweepStatus, sweep_status
from fedllm.storage.kept_records import duration
from fedllm.storage.paths import SweepPaths
from fedllm.storage.sweep_records import SweepRecord

_METRICS = {"loss": "answer loss", "rouge_l": "Rouge-L", "exact_match": "exact match"}
_SpentOfArms = Mapping[str, Sequence[Sequence[SpentRound]]]  # arm -> its runs


def sweep_report(root: Path) -> Report:
    """Return the report of the sweep at `root`, finished or not."""
    paths = SweepPaths(root=root.resolve())
    record, status = SweepRecord.read(paths.record), sweep_status(paths)
    endpoint = str(record.comparison.get("endpoint", "unseen_loss"))
    group, _ = endpoint_parts(endpoint)
    sections = [
        _score_section(paths, record, group),
        *_comparison_sections(root),
        _cost_section(_spent(paths, record, endpoint), endpoint),
        _tuning_section(status),
        _run_section(status),
        PageSection(
            name="configuration",
            title="The sweep's file",
            words="Every run's directory has its whole configuration.",
            verbatim=paths.file.read_text(encoding="utf-8") if paths.file.exists() else "",
        ),
    ]
    return Report(
        title=f"Sweep {root.resolve().name}",
        subtitle=f"arms: {', '.join(record.arms())} · endpoint {endpoint}",
        notices=list(_notices(status)),
        facts=list(_facts(record, status)),
        sections=[section for section in sections if section],
    )


def _notices(status: SweepStatus) -> Iterator[str]:
    if status.state != "done":
        done = sum(run.state == "done" for run in status.runs)
        yield (
            f"This sweep is not finished ({status.state}): {done} of {len(status.runs)} runs are "
            "done. The report shows what is recorded so far."
        )


def _facts(record: SweepRecord, status: SweepStatus) -> Iterator[Fact]:
    runs = [run for run in record.runs if run.phase == "run"]
    done = sum(run.state == "done" for run in status.runs)
    yield Fact(label="runs done", value=f"{done} of {len(status.runs)}")
    yield Fact(label="arms", value=str(len({run.arm for run in runs})))
    seeds = sorted(set(Counter(run.arm for run in runs).values()))
    yield Fact(label="seeds of an arm", value=" or ".join(map(str, seeds)))
    if status.estimate and status.state != "done":
        yield Fact(label="work left", value=duration(status.estimate.seconds))


def _spent(paths: SweepPaths, record: SweepRecord, endpoint: str) -> _SpentOfArms:
    """Return arm -> the evaluated rounds of its runs, without runs that have none."""
    arms: dict[str, list[Sequence[SpentRound]]] = {}
    for run in record.runs:
        if run.phase == "run":
            rounds = spent_rounds(paths.run(run.name), validate(run.config), endpoint)
            if rounds:
                arms.setdefault(run.arm, []).append(rounds)
    return arms


def _score_section(paths: SweepPaths, record: SweepRecord, group: str) -> PageSection:
    charts: list[Chart] = []
    rows: list[Row] = []
    for metric, name in _METRICS.items():
        spent = _spent(paths, record, f"{group}_{metric}")
        if not spent:
            continue
        charts.append(_curves(spent, metric, f"{name}, {GROUP_WORDS[group]}"))
        rows += [
            {"arm": arm, "score": name, "round": number, "seeds": len(values)}
            | {"mean": statistics.fmean(values), "least": min(values), "most": max(values)}
            for arm, runs in spent.items()
            for number, values in _values_by_round(runs).items()
        ]
    return PageSection(
        name="scores",
        title="Scores on test rows",
        words=(
            "Mean over clients as deployed, then over the seeds of an arm; the band spans its "
            "seeds. The A/A arm is a method once more with other seeds: a difference that is no "
            "larger than its distance to that method is what seeds alone do."
            if charts
            else "Nothing was evaluated yet."
        ),
        charts=charts,
        tables=table_of("scores", "Scores per arm and round", rows),
    )


def _values_by_round(runs: Sequence[Sequence[SpentRound]]) -> dict[int, list[float]]:
    values: dict[int, list[float]] = {}
    for rounds in runs:
        for spent in rounds:
            values.setdefault(spent.round, []).append(spent.value)
    return dict(sorted(values.items()))


def _curves(spent: _SpentOfArms, metric: str, title: str) -> LineChart:
    by_round = {arm: _values_by_round(runs) for arm, runs in spent.items()}
    series: dict[str, list[Point]] = {
        arm: [(n, statistics.fmean(values)) for n, values in found.items()]
        for arm, found in by_round.items()
    }
    bands: dict[str, list[Band]] = {
        arm: [(n, min(values), max(values)) for n, values in found.items()]
        for arm, found in by_round.items()
    }
    ends = ", ".join(f"{arm} {points[-1][1]:.3f}" for arm, points in series.items())
    return LineChart(
        name=f"scores-{metric.replace('_', '-')}",
        title=f"{title[0].upper()}{title[1:]}",
        text=f"{title} after each evaluated round, one line per arm with the span of its seeds; "
        f"at the end {ends}",
        series=series,
        bands=bands,
        x_label="round",
        y_label=_METRICS[metric],
        whole_x=True,
        from_zero=metric != "loss",
    )


def _comparison_sections(root: Path) -> Iterator[PageSection]:
    """Yield the two questions, each in a section of its own; or why they have no answer yet."""
    try:
        comparison = comparison_of(read_scored_arms([str(root)]))
    except FedllmError as error:
        yield PageSection(name="comparison", title="Comparison", words=f"None yet: {error}")
        return
    yield PageSection(
        name="arms",
        title="Arms",
        words="The last evaluation of every run that is done; quality at equal spending counts the "
        "last evaluation within what the arm that spends least has spent.",
        tables=table_of("arms", "Arms", list(_arm_rows(comparison)), is_open=True),
    )
    answers = comparison.answers
    yield _answer_section(
        "models",
        "These models",
        "Differences per client, averaged over seeds: for new clients, not for new seeds. A "
        "difference below zero: the first arm has the lower loss, or the lower score.",
        answers.models,
    )
    yield _answer_section(
        "methods",
        "These methods",
        "Differences per seed: for new seeds and clients. Intervals hold 95 % of bootstrap "
        "samples; with few seeds they are too narrow.",
        answers.methods,
    )
    categories = [
        {"category": a.category, "clients": a.clients, "difference": a.difference}
        | {"p": a.test.p if a.test else None, "adjusted p": a.adjusted}
        for a in answers.categories
    ]
    if categories:
        yield PageSection(
            name="categories",
            title="Categories",
            words=f"{' - '.join(answers.models[0].contrast)}, {comparison.endpoint}; a category "
            "with too few clients has no test.",
            tables=table_of("categories", "Difference by category", categories),
        )


def _arm_rows(comparison: Comparison) -> Iterator[Row]:
    for row in comparison.arms:
        yield {
            "arm": row.arm,
            "seeds": len(row.seeds),
            "parameters per client": row.parameters_per_client,
            comparison.endpoint: row.mean,
            "deviation over seeds": row.deviation,
            "worst tenth of clients": row.worst_tenth,
            **{f"at {budget}": value for budget, value in row.within.items()},
        }


def _answer_section(name: str, title: str, words: str, answers: Sequence[Answer]) -> PageSection:
    rows: list[Row] = [
        {"contrast": " - ".join(a.contrast), "role": a.role, "endpoint": a.endpoint}
        | {"count": a.count, "difference": a.difference}
        | {"low": a.interval.low if a.interval else None}
        | {"high": a.interval.high if a.interval else None}
        | {"p": a.test.p if a.test else None, "adjusted p": a.adjusted, "why no test": a.why}
        for a in answers
    ]
    endpoint = answers[0].endpoint
    shown = {
        " - ".join(a.contrast): (a.interval.low, a.difference, a.interval.high)
        for a in answers
        if a.endpoint == endpoint and a.interval
    }
    chart = IntervalChart(
        name=f"differences-{name}",
        title=f"{title}: difference in {endpoint}",
        text="; ".join(
            f"{k}: {d:+.3f}, {low:+.3f} to {h:+.3f}" for k, (low, d, h) in shown.items()
        ),
        intervals=shown,
        x_label="difference, 95 % interval",
    )
    return PageSection(
        name=name,
        title=title,
        words=words,
        charts=[chart] if shown else (),
        tables=table_of(name, f"{title}: all contrasts and endpoints", rows, is_open=True),
    )


def _cost_section(spent: _SpentOfArms, endpoint: str) -> PageSection | None:
    runs = [rounds for of_arm in spent.values() for rounds in of_arm]
    if not runs or not all(rounds[-1].is_known for rounds in runs):
        return None
    has_gpus = all(rounds[-1].gpu_seconds > 0 for rounds in runs)
    time = GPU_SECONDS if has_gpus else CLIENT_SECONDS
    return PageSection(
        name="efficiency",
        title="Quality against cost",
        words="Means over the seeds of an arm, after each evaluated round.",
        charts=[
            _against(spent, endpoint, "bytes", BYTES),
            _against(spent, endpoint, "time", time),
        ],
    )


def _against(spent: _SpentOfArms, endpoint: str, name: str, budget: Budget) -> LineChart:
    return LineChart(
        name=f"quality-against-{name}",
        title=f"{endpoint} against {name}",
        text=f"{endpoint} after {budget.unit}, one line per arm",
        series={arm: list(_mean_points(runs, budget.of)) for arm, runs in spent.items()},
        x_label=budget.unit,
        y_label=endpoint,
    )


def _mean_points(
    runs: Sequence[Sequence[SpentRound]], amount: Callable[[SpentRound], float]
) -> Iterator[Point]:
    """Yield the means over runs of amount and value, for rounds that all runs evaluated."""
    for same in zip(*runs, strict=False):
        yield statistics.fmean(map(amount, same)), statistics.fmean(each.value for each in same)


def _tuning_section(status: SweepStatus) -> PageSection | None:
    if not status.tuned:
        return None
    rows: list[Row] = [
        {"arm": tuned.arm, "learning rate": rate, "dev loss": loss, "chosen": rate == tuned.best}
        for tuned in status.tuned
        for rate, loss in tuned.losses.items()
    ]
    return PageSection(
        name="tuning",
        title="Learning rates",
        words="Every arm tried every rate for the same rounds, scored on dev clients alone. An arm "
        "whose best rate is at the edge of the grid wants a wider one.",
        tables=table_of("tuning", "The whole grid", rows, is_open=True),
    )


def _run_section(status: SweepStatus) -> PageSection:
    rows: list[Row] = [
        {"run": run.name, "arm": run.arm, "phase": run.phase, "state": run.state}
        | {"rounds done": run.rounds_done, "rounds": run.rounds, "problem": run.problem}
        for run in status.runs
    ]
    return PageSection(
        name="runs",
        title="Runs",
        words="Each is a run directory below the sweep's, with a report of its own: "
        "fedllm report SWEEP/RUN.",
        tables=table_of("runs", "All runs", rows),
    )
