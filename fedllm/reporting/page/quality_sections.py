"""Sections on quality: scores over rounds, training, categories, tiers, answers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.page.contents import (
    ChangeChart,
    Chart,
    LineChart,
    PageSection,
    Point,
    table_of,
)
from fedllm.reporting.results import run_rows
from fedllm.reporting.results.gains import GROUPS
from fedllm.reporting.results.run_rows import Row
from fedllm.storage.paths import RunPaths

_SCORES = {"test_loss": "answer loss", "test_rouge_l": "Rouge-L", "test_exact_match": "exact match"}
_MAX_CHANGES = 30
_EXAMPLES = 6
_MOST_ROUNDS_BY_STEP = 12


def score_section(groups: Sequence[Row]) -> PageSection:
    """Return scores on test rows, per group of clients and round."""
    charts = [
        LineChart(
            name=f"scores-{key.removeprefix('test_').replace('_', '-')}",
            title=f"{name[0].upper()}{name[1:]} on test rows",
            text=f"{name} after each evaluated round, one line per group of clients: "
            + _ends(groups, key),
            series=by_label(groups, key, lambda row: GROUP_WORDS[row["group"]]),
            x_label="round",
            y_label=name,
            whole_x=True,
            from_zero=key != "test_loss",
        )
        for key, name in _SCORES.items()
    ]
    return PageSection(
        name="scores",
        title="Scores on test rows",
        words=(
            "Means over clients, each with the adapter of its own rank; round 0 is the state "
            "before training. Lower loss is better, higher Rouge-L and exact match are better."
            if groups
            else "Nothing was evaluated yet."
        ),
        charts=charts if groups else (),
        tables=table_of("scores", "Scores per round and group of clients", groups),
    )


def training_section(clients: Sequence[Row]) -> PageSection:
    """Return the loss of local training: over the steps of every round, per tier."""
    trained = [row for row in clients if row.get("training_losses")]
    numbers = distinct(trained, "round")
    by_step = trained
    charts: list[Chart] = []
    if len(numbers) > _MOST_ROUNDS_BY_STEP:
        # the steps of so many rounds are a solid block
        by_step = [row for row in trained if row["round"] == numbers[-1]]
        charts.append(_loss_by_round(trained))
    if trained:
        charts.append(_loss_by_step(by_step))
    hidden = {"training_losses", "test_rows"}
    shown = [
        {key: value for key, value in row.items() if key not in hidden and "test_" not in key}
        for row in trained
    ]
    return PageSection(
        name="training",
        title="Training",
        words=(
            "The loss of every client's own steps, on its training rows. Every round begins with "
            "the adapter that the clients received."
            if trained
            else "No client's training was recorded yet."
        ),
        charts=charts,
        tables=table_of("clients", "Training of every client and round", shown),
    )


def _loss_by_step(rows: Sequence[Row]) -> LineChart:
    return LineChart(
        name="training-loss",
        title="Loss of local training",
        text="mean loss of the clients' steps, one line per tier, from left to right in a round",
        series={tier: list(_curve(rows, tier)) for tier in distinct(rows, "tier")},
        x_label="round",
        y_label="loss of a step",
        whole_x=True,
    )


def _loss_by_round(rows: Sequence[Row]) -> LineChart:
    means: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        means.setdefault((row["tier"], row["round"]), []).append(row["training_loss"])
    points = [
        {"tier": tier, "round": number, "loss": sum(losses) / len(losses)}
        for (tier, number), losses in means.items()
    ]
    return LineChart(
        name="training-loss-by-round",
        title="Loss of local training by round",
        text="mean loss of a round's clients over all their steps, one line per tier",
        series=by_label(points, "loss", lambda row: row["tier"]),
        x_label="round",
        y_label="mean loss of the steps",
        whole_x=True,
    )


def _curve(trained: Sequence[Row], tier: str) -> Iterator[Point]:
    """Yield the mean loss of a tier's clients at every recorded point of every round."""
    for number in distinct(trained, "round"):
        curves = [
            row["training_losses"]
            for row in trained
            if row["round"] == number and row["tier"] == tier
        ]
        if not curves:
            continue
        longest = max(map(len, curves))
        for place in range(longest):
            at = [curve[place] for curve in curves if place < len(curve)]
            yield number - 1 + (place + 0.5) / longest, sum(at) / len(at)
        yield number, None


def category_section(categories: Sequence[Row], group: str) -> PageSection | None:
    """Return the change of every category of clients; None if the group has no categories."""
    rows = [row for row in categories if row["category"]]
    if not any(row["group"] == group for row in rows):
        return None
    return _change_section(
        rows,
        "category",
        group,
        name="categories",
        title="Categories",
        words="Mean answer loss of the clients of each category, on test rows",
    )


def kind_section(kinds: Sequence[Row]) -> PageSection | None:
    """Return the change of every kind of tasks, of unseen categories where there are any."""
    groups = distinct(kinds, "group")
    group = next((name for name in ("new_category", *GROUPS) if name in groups), None)
    if group is None:
        return None
    return _change_section(
        kinds,
        "kind",
        group,
        name="kinds",
        title="Kinds of tasks",
        words="Mean answer loss of the clients of each kind of tasks, on test rows",
    )


def tier_section(tiers: Sequence[Row], group: str) -> PageSection | None:
    """Return the change of every tier; None without an evaluation."""
    if not any(row["group"] == group for row in tiers):
        return None
    return _change_section(
        tiers,
        "tier",
        group,
        name="tiers",
        title="Tiers",
        words="Mean answer loss of the clients of each tier with the adapter of its own rank",
    )


def _change_section(
    rows: Sequence[Row], key: str, group: str, *, name: str, title: str, words: str
) -> PageSection:
    mine = [row for row in rows if row["group"] == group]
    first, last = (
        {row[key]: row["test_loss"] for row in mine if row["round"] == number}
        for number in (mine[0]["round"], mine[-1]["round"])
    )
    changes = {label: (first.get(label), loss) for label, loss in last.items()}
    order = sorted(changes, key=lambda label: (changes[label][0] or 0.0) - changes[label][1])
    best = list(reversed(order))
    about = f"{GROUP_WORDS[group]}, round {mine[0]['round']} and round {mine[-1]['round']}"
    hidden = len(best) - _MAX_CHANGES
    chart = ChangeChart(
        name=name,
        title=f"Answer loss by {key}",
        text=f"{about}, the largest fall first: "
        + ", ".join(f"{label} {_arrow(*changes[label])}" for label in best[:_MAX_CHANGES]),
        changes={label: changes[label] for label in best[:_MAX_CHANGES]},
        x_label="answer loss",
        before=f"round {mine[0]['round']}",
        after=f"round {mine[-1]['round']}",
    )
    rest = f" {hidden} more stand in the table." if hidden > 0 else ""
    return PageSection(
        name=name,
        title=title,
        words=f"{words}: {about}.{rest}",
        charts=[chart],
        tables=table_of(name, f"Scores per round, group and {key}", rows),
    )


def answer_section(paths: RunPaths) -> PageSection | None:
    """Return some rows with the answers before training and after the last evaluation."""
    rows = run_rows.answer_rows(paths)
    numbers = distinct(rows, "round")
    if len(numbers) < 2:
        return None
    before, after = (
        {(row["client"], row["row"]): row for row in rows if row["round"] == number}
        for number in (numbers[0], numbers[-1])
    )
    shared = [key for key in after if key in before]
    # one row of a client, spread over the clients
    firsts = list({client: (client, row) for client, row in reversed(shared)}.values())[::-1]
    step = max(1, len(firsts) // _EXAMPLES)
    chosen = firsts[::step][:_EXAMPLES]
    examples = [
        {
            "client": client,
            "end of the prompt": after[client, row]["prompt"][-160:],
            "reference": after[client, row]["references"][0],
            f"answer, round {numbers[0]}": before[client, row]["answer"],
            f"answer, round {numbers[-1]}": after[client, row]["answer"],
        }
        for client, row in chosen
    ]
    return PageSection(
        name="answers",
        title="Answers",
        words="Some test rows with what the model answered before training and at the end. They "
        "are taken from clients in their order, not for their quality.",
        tables=[
            *table_of("examples", "Answers before and after", examples, is_open=True),
            *table_of("answers", "All kept answers", rows),
        ],
    )


def by_label(
    rows: Iterable[Mapping[str, Any]], key: str, label_of: Any, x: str = "round"
) -> dict[str, list[Point]]:
    """Return label -> points (`x`, `key`) of rows."""
    series: dict[str, list[Point]] = {}
    for row in rows:
        series.setdefault(label_of(row), []).append((row[x], row[key]))
    return series


def distinct(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """Return the distinct values of a column, in order of their first row."""
    return list(dict.fromkeys(row[key] for row in rows))


def _ends(rows: Sequence[Row], key: str) -> str:
    """Return the first and last value of every group, in words."""
    series = by_label(rows, key, lambda row: GROUP_WORDS[row["group"]])
    return ", ".join(
        f"{label} {_arrow(points[0][1], points[-1][1])}" for label, points in series.items()
    )


def _arrow(before: float | None, after: float | None) -> str:
    words = ["unknown" if value is None else f"{value:.3f}" for value in (before, after)]
    return " to ".join(words)
