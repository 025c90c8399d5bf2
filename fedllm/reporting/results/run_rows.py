"""What a run recorded, as rows of plain values: for tables, charts and data frames.

A value that is not known is None, in every row of the same table. Rounds are those that have the
record, so an unfinished run has rows too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from fedllm.reporting.results.metrics import categories_of, mean_scores
from fedllm.reporting.results.task_kinds import kind_of
from fedllm.reporting.task_times import task_times
from fedllm.storage.kept_records import AnswersRecord, ClientsRecord, TasksRecord
from fedllm.storage.paths import RoundPaths, RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    ClientScores,
    EvaluationRecord,
    PreparedRecord,
    Scores,
)

Row: TypeAlias = dict[str, Any]
_SCORES = ("loss", "rouge_l", "exact_match")
_QUANTITIES = (
    *("route", "stacked_rank", "total_energy", "effective_rank", "beyond_smallest_rank"),
    *("overlap", "residual_energy", "relative_excess", "failure_probability"),
)


def rounds_of(paths: RunPaths) -> list[RoundPaths]:
    """Return the rounds that have begun, round 0 first; backups of rounds have other names."""
    if not paths.rounds.is_dir():
        return []
    numbers = (int(path.name) for path in paths.rounds.iterdir() if path.name.isdecimal())
    return [paths.round(number) for number in sorted(numbers)]


def client_rows(paths: RunPaths) -> list[Row]:
    """Return a row per round and client that trained or was scored.

    `training_...` and other fields without a prefix are of its training, `test_...` its scores as
    deployed, `test_..._at_largest_rank` those with the largest adapter.
    """
    categories = categories_of(paths)
    rows: dict[tuple[int, str], Row] = {}
    for each in rounds_of(paths):
        for client, values in _training(each):
            rows[each.number, client] = values
        for scores in _scores(each):
            row = rows.setdefault((each.number, scores.client), {"tier": scores.tier})
            row |= {"group": scores.group, **_both_scores(scores)}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return [
        {"round": number, "client": client, "category": categories.get(client, "")}
        | {name: row.get(name) for name in names}
        for (number, client), row in rows.items()
    ]


def _training(paths: RoundPaths) -> Iterator[tuple[str, Row]]:
    record = ClientsRecord.find(paths.clients)
    renamed = {"loss": "training_loss", "first_loss": "training_loss_first_step"}
    renamed |= {"last_loss": "training_loss_last_step", "losses": "training_losses"}
    for client in record.clients if record else ():
        values = client.model_dump()
        name = values.pop("client")
        yield name, {renamed.get(key, key): value for key, value in values.items()}


def _scores(paths: RoundPaths) -> Sequence[ClientScores]:
    record = EvaluationRecord.find(paths.evaluation_record)
    return record.clients if record else ()


def _both_scores(scores: ClientScores) -> Row:
    deployed, largest = scores.as_deployed, scores.at_largest_rank
    return {
        "test_rows": deployed.rows,
        **{f"test_{name}": getattr(deployed, name) for name in _SCORES},
        **{f"test_{name}_at_largest_rank": getattr(largest, name) for name in _SCORES},
    }


def group_rows(paths: RunPaths) -> list[Row]:
    """Return mean scores as deployed per round and group of clients: train, dev, unseen."""
    return _mean_rows(paths, ("group",), lambda client: (client.group,))


def tier_rows(paths: RunPaths) -> list[Row]:
    """Return mean scores as deployed per round, group and tier."""
    return _mean_rows(paths, ("group", "tier"), lambda client: (client.group, client.tier))


def category_rows(paths: RunPaths) -> list[Row]:
    """Return mean scores as deployed per round, group and category of the clients.

    Clients without a category have the category "".
    """
    categories = categories_of(paths)
    names = ("group", "category")
    return _mean_rows(
        paths, names, lambda client: (client.group, categories.get(client.client, ""))
    )


def kind_rows(paths: RunPaths) -> list[Row]:
    """Return mean scores as deployed per round, group and kind of tasks, where there are kinds."""
    categories = categories_of(paths)
    rows = _mean_rows(
        paths,
        ("group", "kind"),
        lambda client: (client.group, kind_of(categories.get(client.client, "")) or ""),
    )
    return [row for row in rows if row["kind"]]


def _mean_rows(
    paths: RunPaths, names: tuple[str, ...], key: Callable[[ClientScores], tuple[str, ...]]
) -> list[Row]:
    rows: list[Row] = []
    for each in rounds_of(paths):
        members: dict[tuple[str, ...], list[Scores]] = {}
        for client in _scores(each):
            members.setdefault(key(client), []).append(client.as_deployed)
        for values, scores in sorted(members.items()):
            mean = mean_scores(scores)
            if mean:
                row: Row = {"round": each.number, **dict(zip(names, values, strict=True))}
                row["clients"] = mean.clients
                rows.append(row | {f"test_{name}": getattr(mean, name) for name in _SCORES})
    return rows


def module_rows(paths: RunPaths) -> list[Row]:
    """Return a row per round and module: how its update spreads, and what each rank keeps."""
    prepared = PreparedRecord.find(paths.prepared)
    modules = prepared.modules if prepared else {}
    rows: list[Row] = []
    for each in rounds_of(paths):
        record = AggregateRecord.find(each.aggregate_record)
        for name, found in record.modules.items() if record else ():
            about = modules.get(name)
            row: Row = {"round": each.number, "module": name}
            row |= {"kind": about.kind if about else None}
            row |= {"out_features": about.out_features if about else None}
            row |= {"in_features": about.in_features if about else None}
            row |= {quantity: getattr(found, quantity) for quantity in _QUANTITIES}
            row["spectrum"] = list(found.spectrum)
            for quality in found.ranks:
                row[f"energy_kept_rank_{quality.rank}"] = quality.energy_kept
                row[f"truncation_error_rank_{quality.rank}"] = quality.truncation_error
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def partition_rows(paths: RunPaths) -> list[Row]:
    """Return a row per round, module and range of directions between two ranks."""
    rows: list[Row] = []
    for each in rounds_of(paths):
        record = AggregateRecord.find(each.aggregate_record)
        for name, found in record.modules.items() if record else ():
            rows += [
                {"round": each.number, "module": name, **partition.model_dump()}
                for partition in found.partitions
            ]
    return rows


def task_rows(paths: RunPaths) -> list[Row]:
    """Return a row per task: when it was submitted, started and ended, in seconds of the epoch."""
    rows: list[Row] = []
    for each in rounds_of(paths):
        record = TasksRecord.find(each.tasks)
        tasks = record.tasks if record else task_times(each)
        rows += [{"round": each.number, **task.model_dump()} for task in tasks]
    return rows


def answer_rows(paths: RunPaths) -> list[Row]:
    """Return a row per kept answer: the prompt, the references and what was generated."""
    rows: list[Row] = []
    for each in rounds_of(paths):
        record = AnswersRecord.find(each.answers)
        answers = record.answers if record else []
        rows += [{"round": each.number, **answer.model_dump()} for answer in answers]
    return rows
