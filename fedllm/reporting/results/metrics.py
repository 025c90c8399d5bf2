"""Metrics of a run, rebuilt from its records: the records alone are the truth."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedllm.planning.roles import GROUP_WORDS
from fedllm.reporting.results.accounting import account_metrics, round_account
from fedllm.reporting.results.spectra import metrics_of
from fedllm.reporting.results.task_kinds import kinds_of
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import (
    AggregateRecord,
    ClientScores,
    CollectionRecord,
    EvaluationRecord,
    PreparedRecord,
    RoundRecord,
    Scores,
)


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean of scores over clients; each client counts once."""

    clients: int
    loss: float
    rouge_l: float
    exact_match: float


def mean_scores(scores: Iterable[Scores]) -> Mean | None:
    """Return the unweighted mean over clients, None if there are none."""
    all_scores = list(scores)
    if not all_scores:
        return None
    return Mean(
        clients=len(all_scores),
        loss=sum(s.loss for s in all_scores) / len(all_scores),
        rouge_l=sum(s.rouge_l for s in all_scores) / len(all_scores),
        exact_match=sum(s.exact_match for s in all_scores) / len(all_scores),
    )


def row_weighted(scores: Iterable[Scores]) -> Mean | None:
    """Return the mean over clients by their scored rows, as FlexLoRA (2402.11505) reports it."""
    all_scores = list(scores)
    rows = sum(s.rows for s in all_scores)
    if not rows:
        return None
    return Mean(
        clients=len(all_scores),
        loss=sum(s.rows * s.loss for s in all_scores) / rows,
        rouge_l=sum(s.rows * s.rouge_l for s in all_scores) / rows,
        exact_match=sum(s.rows * s.exact_match for s in all_scores) / rows,
    )


def category_mean(clients: Iterable[ClientScores], categories: Mapping[str, str]) -> Mean | None:
    """Return the mean of the categories' means as deployed; each category counts once.

    Args:
        clients: the scored clients.
        categories: client -> category; clients that it lacks share one.
    """
    groups: dict[str, list[Scores]] = {}
    for client in clients:
        groups.setdefault(categories.get(client.client, ""), []).append(client.as_deployed)
    means = [mean for mean in map(mean_scores, groups.values()) if mean]
    if not means:
        return None
    return Mean(
        clients=sum(mean.clients for mean in means),
        loss=sum(mean.loss for mean in means) / len(means),
        rouge_l=sum(mean.rouge_l for mean in means) / len(means),
        exact_match=sum(mean.exact_match for mean in means) / len(means),
    )


def other_means(
    clients: Sequence[ClientScores], categories: Mapping[str, str]
) -> dict[str, Mean | None]:
    """Return the means beside that over clients as deployed, by the suffix of their metrics."""
    return {
        "row_weighted": row_weighted(client.as_deployed for client in clients),
        "category_mean": category_mean(clients, categories),
        "at_largest_rank": mean_scores(client.at_largest_rank for client in clients),
    }


def categories_of(paths: RunPaths) -> Mapping[str, str]:
    """Return client -> category of a run; empty before its data is prepared."""
    prepared = PreparedRecord.find(paths.prepared)
    return {client.id: client.category for client in prepared.clients} if prepared else {}


def by_tier(clients: Iterable[ClientScores]) -> dict[str, Mean]:
    """Return the mean scores as deployed, per tier."""
    groups: dict[str, list[Scores]] = {}
    for client in clients:
        groups.setdefault(client.tier, []).append(client.as_deployed)
    means = {tier: mean_scores(scores) for tier, scores in sorted(groups.items())}
    return {tier: mean for tier, mean in means.items() if mean}


def by_group(clients: Iterable[ClientScores]) -> dict[str, Mean]:
    """Return the mean scores as deployed, per group: train, dev, unseen."""
    groups: dict[str, list[Scores]] = {}
    for client in clients:
        groups.setdefault(client.group, []).append(client.as_deployed)
    means = {group: mean_scores(scores) for group, scores in groups.items()}
    return {group: mean for group, mean in means.items() if mean}


def by_kind(
    clients: Iterable[ClientScores], categories: Mapping[str, str]
) -> dict[str, dict[str, Mean]]:
    """Return the mean scores as deployed by group, then by kind of tasks where there is one."""
    found: dict[str, dict[str, Mean]] = {}
    scored = list(clients)
    for group in dict.fromkeys(client.group for client in scored):
        members = {c.client: c.as_deployed for c in scored if c.group == group}
        for kind, of_kind in kinds_of(categories, members).items():
            mean = mean_scores(members[client] for client in of_kind)
            assert mean is not None, "a kind has clients"
            found.setdefault(group, {})[kind] = mean
    return found


def headline(evaluation: EvaluationRecord | None) -> str:
    """Return the scores of a round in a few words, empty without an evaluation."""
    if evaluation is None:
        return ""
    parts = [
        f"{GROUP_WORDS[group]} loss {mean.loss:.3f} Rouge-L {mean.rouge_l:.3f} "
        f"exact {mean.exact_match:.3f}"
        for group, mean in by_group(evaluation.clients).items()
    ]
    return "; on test rows: " + "; ".join(parts) if parts else ""


def write_metrics(paths: RunPaths) -> None:
    """Rebuild `metrics.jsonl`, one line per finished round."""
    lines = [json.dumps(row, allow_nan=False) for row in metric_rows(paths)]
    publish_bytes(paths.metrics, "".join(f"{line}\n" for line in lines).encode())


def metric_rows(paths: RunPaths) -> list[dict[str, object]]:
    """Return the metrics of every finished round, by name."""
    rows = []
    categories = categories_of(paths)
    # backups of round folders have other names
    numbers = sorted(int(p.name) for p in paths.rounds.glob("*") if p.name.isdecimal())
    for number in numbers:
        round_paths = paths.round(number)
        record = RoundRecord.find(round_paths.record)
        if record is None:
            continue
        row: dict[str, object] = record.model_dump(mode="json")
        collected = CollectionRecord.find(round_paths.collection)
        if collected:
            row |= collected.training
        account = round_account(round_paths)
        if account:
            row |= account_metrics(account)
        aggregated = AggregateRecord.find(round_paths.aggregate_record)
        if aggregated:
            row["aggregate_seconds"] = aggregated.seconds
            row |= metrics_of(aggregated)
        evaluation = EvaluationRecord.find(round_paths.evaluation_record)
        if evaluation:
            row["evaluation_complete"] = evaluation.complete
            row |= _evaluation_metrics(evaluation, categories)
        # some readers of JSON do not know NaN
        rows.append({key: None if _is_not_finite(value) else value for key, value in row.items()})
    return rows


def _evaluation_metrics(
    evaluation: EvaluationRecord, categories: Mapping[str, str]
) -> dict[str, object]:
    """Return the mean scores of every group of clients, in every way of averaging them."""
    row: dict[str, object] = {}
    for group, mean in by_group(evaluation.clients).items():
        members = [client for client in evaluation.clients if client.group == group]
        means = {group: mean}
        for suffix, other in other_means(members, categories).items():
            means |= {f"{group}_{suffix}": other} if other else {}
        row |= _published_metrics(group, members)
        for kind, of_kind in by_kind(members, categories).get(group, {}).items():
            means[f"{group}_{kind.replace(' ', '_')}"] = of_kind
        for name, each in means.items():
            row |= {f"{name}_loss": each.loss, f"{name}_rouge_l": each.rouge_l}
            row[f"{name}_exact_match"] = each.exact_match
    return row


def _published_metrics(group: str, members: Sequence[ClientScores]) -> dict[str, object]:
    """Return the teacher-forced Rouge-L, over clients and over rows, if the run scored it."""
    scores = [
        (client.as_deployed.rows, client.as_deployed.rougeL_published)
        for client in members
        if client.as_deployed.rougeL_published is not None
    ]
    if not scores:
        return {}
    rows = max(1, sum(count for count, _ in scores))
    return {
        f"{group}_rougeL_published": sum(score for _, score in scores) / len(scores),
        f"{group}_row_weighted_rougeL_published": sum(n * score for n, score in scores) / rows,
    }


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
