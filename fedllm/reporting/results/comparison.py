"""Comparison of the last rounds of runs on the same clients, side by side, tier by tier."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedllm.config.loading import read_config
from fedllm.errors import RunDirectoryError
from fedllm.reporting.results.spectra import last_spectra_table, rank_table
from fedllm.reporting.results.summary import (
    bytes_table,
    last_evaluation,
    scores_by_tier,
)
from fedllm.reporting.tables import number, text_table
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    CohortRecord,
    EvaluationRecord,
    PreparedRecord,
)

_BASE = "base"
_SCORES = (("answer loss", "loss"), ("Rouge-L", "rouge_l"), ("exact match", "exact_match"))


def compare(runs: Mapping[str, Path]) -> str:
    """Return the base and the last evaluation of several runs, per tier of the last run.

    Only clients that were scored in all runs count; the base is that of the first run.

    Raises:
        RunDirectoryError: a run has no evaluation of its base or of its last round, or no client
            was scored in all runs.
    """
    evaluations: dict[str, EvaluationRecord] = {}
    for name, root in runs.items():
        paths = RunPaths(root=root)
        base = EvaluationRecord.find(paths.round(0).evaluation_record)
        last = last_evaluation(paths, read_config(paths.config).rounds)
        if base is None or last is None or not last.round:
            raise RunDirectoryError(
                f"{root}: no evaluation of the base or of a later round; resume the run"
            )
        evaluations.setdefault(_BASE, base)
        evaluations[name] = last
    tiers = _tiers_of_all(list(evaluations.values()))
    if not tiers:
        raise RunDirectoryError(
            f"{', '.join(map(str, runs.values()))}: no client was scored in all of them; compare "
            "runs of the same data, clients.split_seed and evaluation"
        )
    columns = {name: scores_by_tier(_in_tiers(e, tiers)) for name, e in evaluations.items()}
    tables = [
        text_table(
            f"{title} per tier, on test rows of the same clients",
            ["tier", *columns],
            [
                [tier, *(number(getattr(means[tier], key)) for means in columns.values())]
                for tier in columns[_BASE]
            ],
        )
        for title, key in _SCORES
    ]
    return "\n\n".join([*tables, *_last_tables(runs)])


def _tiers_of_all(evaluations: Sequence[EvaluationRecord]) -> dict[str, str]:
    """Return client -> tier in the last evaluation, for the clients that all evaluations scored."""
    scored = [{client.client for client in evaluation.clients} for evaluation in evaluations]
    in_all = set.intersection(*scored)
    return {c.client: c.tier for c in evaluations[-1].clients if c.client in in_all}


def _in_tiers(evaluation: EvaluationRecord, tiers: Mapping[str, str]) -> EvaluationRecord:
    """Return the evaluation with its clients in the tiers of another run."""
    clients = [
        client.model_copy(update={"tier": tiers[client.client]})
        for client in evaluation.clients
        if client.client in tiers
    ]
    return evaluation.model_copy(update={"clients": clients})


def _last_tables(runs: Mapping[str, Path]) -> list[str]:
    """Return tables about the last round of every run, and about the last run."""
    states = {name: RunPaths(root=root).newest_state() for name, root in runs.items()}
    ends = {name: state for name, state in states.items() if state}
    records = {name: AggregateRecord.read(end.aggregate_record) for name, end in ends.items()}
    last, prepared = list(runs)[-1], RunPaths(root=list(runs.values())[-1]).prepared
    return [
        rank_table(records[last]),
        last_spectra_table(records),
        bytes_table(CohortRecord.read(ends[last].cohort), PreparedRecord.read(prepared)),
    ]
