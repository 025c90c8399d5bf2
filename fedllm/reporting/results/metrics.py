"""Metrics of a run, rebuilt from its records: the records alone are the truth."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedllm.reporting.results.accounting import account_metrics, round_account
from fedllm.reporting.results.spectra import metrics_of
from fedllm.storage.paths import RunPaths
from fedllm.storage.publishing.publish import publish_bytes
from fedllm.storage.records import (
    AggregateRecord,
    ClientScores,
    CollectionRecord,
    EvaluationRecord,
    RoundRecord,
    Scores,
)

_CLIENTS = {"train": "training clients", "dev": "dev clients", "unseen": "unseen clients"}


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


def headline(evaluation: EvaluationRecord | None) -> str:
    """Return the scores of a round in a few words, empty without an evaluation."""
    if evaluation is None:
        return ""
    parts = [
        f"{_CLIENTS[group]} loss {mean.loss:.3f} Rouge-L {mean.rouge_l:.3f} "
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
    # backups of round folders have other names
    numbers = sorted(int(p.name) for p in paths.rounds.glob("*") if p.name.isdigit())
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
            for group, mean in by_group(evaluation.clients).items():
                row |= {f"{group}_loss": mean.loss, f"{group}_rouge_l": mean.rouge_l}
                row[f"{group}_exact_match"] = mean.exact_match
        # some readers of JSON do not know NaN
        rows.append({key: None if _is_not_finite(value) else value for key, value in row.items()})
    return rows


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
