"""Summary of a run as tables, from its records."""

import shlex
from collections.abc import Mapping

from fedllm.config.loading import read_config
from fedllm.planning.costs import adapter_weights
from fedllm.reporting.method_words import method_words, privacy_words
from fedllm.reporting.results.metrics import Mean, by_group, by_tier, mean_scores
from fedllm.reporting.results.spectra import rank_table, spectra_table
from fedllm.reporting.tables import number, size, text_table
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    CohortRecord,
    EvaluationRecord,
    ModuleRecord,
    PreparedRecord,
    StopRecord,
)

_FLOAT32_BYTES = 4
ALL = "all"


def scores_by_tier(evaluation: EvaluationRecord) -> dict[str, Mean]:
    """Return the mean scores as deployed per tier, and over all clients as `all`."""
    means = by_tier(evaluation.clients)
    everyone = mean_scores(client.as_deployed for client in evaluation.clients)
    return {**means, ALL: everyone} if everyone else means


def last_evaluation(paths: RunPaths, rounds: int) -> EvaluationRecord | None:
    """Return the newest evaluation of a run."""
    for round_number in range(rounds, -1, -1):
        evaluation = EvaluationRecord.find(paths.round(round_number).evaluation_record)
        if evaluation:
            return evaluation
    return None


def update_bytes(ranks: Mapping[str, int], modules: Mapping[str, ModuleRecord]) -> int:
    """Return the bytes that a client sends (and receives) per round: A and B in float32."""
    return _FLOAT32_BYTES * adapter_weights(ranks, modules)


def run_summary(paths: RunPaths) -> str:
    """Return the tables that `fedllm run` prints at its end."""
    config = read_config(paths.config)
    parts = [f"run {paths.root} ({method_words(config)})"]
    base = EvaluationRecord.find(paths.round(0).evaluation_record)
    last = last_evaluation(paths, config.rounds)
    if base and last and last.round:
        parts.append(_scores_table(base, last, first="start" if config.model.adapter else "base"))
    aggregated = AggregateRecord.find(paths.round(config.rounds).aggregate_record)
    if aggregated:
        parts.append(rank_table(aggregated))
        if aggregated.privacy:
            parts.append(privacy_words(aggregated.privacy, config.rounds))
    spectra = spectra_table(paths, config.rounds)
    if spectra:
        parts.append(spectra)
    cohort = CohortRecord.find(paths.round(config.rounds).cohort)
    prepared = PreparedRecord.find(paths.prepared)
    if cohort and prepared:
        parts.append(bytes_table(cohort, prepared))
    root = shlex.quote(str(paths.root))
    stop = StopRecord.find(paths.stop)
    if stop and stop.round == config.rounds:
        parts.append(
            f"stopped after round {stop.round}: dev clients are best in round {stop.best_round}; "
            f"fedllm export {root} --round best --out adapter"
        )
    parts.append(
        f"next: fedllm export {root} --out adapter    "
        f"fedllm report {root}    fedllm resume {root} --set rounds={config.rounds + 2}"
    )
    return "\n\n".join(parts)


def _scores_table(base: EvaluationRecord, last: EvaluationRecord, *, first: str) -> str:
    before, after = scores_by_tier(base), scores_by_tier(last)
    rows = [
        [
            tier,
            str(after[tier].clients),
            *_arrow(before.get(tier), after[tier]),
        ]
        for tier in after
    ]
    title = f"scores as deployed, {first} -> round {last.round} (mean over clients)"
    return text_table(title, ["tier", "clients", "answer loss", "Rouge-L", "exact match"], rows)


def _arrow(before: Mean | None, after: Mean) -> list[str]:
    names = ("loss", "rouge_l", "exact_match")
    return [
        (f"{number(getattr(before, name))} -> " if before else "") + number(getattr(after, name))
        for name in names
    ]


def bytes_table(cohort: CohortRecord, prepared: PreparedRecord) -> str:
    """Return a table of the bytes that a client of each tier sends per round."""
    rows = [
        [tier, _span(ranks), size(update_bytes(ranks, prepared.modules))]
        for tier, ranks in cohort.ranks.items()
    ]
    return text_table("what a client sends per round", ["tier", "ranks", "bytes"], rows)


def _span(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return str(low) if low == high else f"{low}-{high}"


def score_table(title: str, record: EvaluationRecord) -> str:
    """Return a table of one evaluation, per tier and group."""
    groups = {**scores_by_tier(record), **by_group(record.clients)}
    rows = [
        [name, str(m.clients), number(m.loss), number(m.rouge_l), number(m.exact_match)]
        for name, m in groups.items()
    ]
    header = ["tier or group", "clients", "answer loss", "Rouge-L", "exact match"]
    return text_table(f"{title}, mean over clients", header, rows)
