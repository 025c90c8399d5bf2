"""The last rounds of runs on the same clients, side by side, by group and tier of clients."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from fedllm.config.loading import read_config
from fedllm.errors import RunDirectoryError, UserError
from fedllm.reporting.results.gains import GROUPS
from fedllm.reporting.results.spectra import last_spectra_table, rank_table
from fedllm.reporting.results.summary import (
    bytes_table,
    last_evaluation,
    scores_by_group,
)
from fedllm.reporting.tables import number, text_table
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import (
    AggregateRecord,
    ClientScores,
    CohortRecord,
    EvaluationRecord,
    PreparedRecord,
)

_BASE = "base"
# what the means are of: each tier of each group of clients, or each group
By = Literal["tier", "group"]
BY = get_args(By)
_SCORES = (("answer loss", "loss"), ("Rouge-L", "rouge_l"), ("exact match", "exact_match"))


def side_by_side(runs: Mapping[str, Path], by: By = "tier") -> str:
    """Return the base and the last evaluation of several runs, per group of clients and tier.

    Only clients that were scored in all runs count; the base is that of the first run.

    Raises:
        RunDirectoryError: a run has no evaluation of its base or of its last round, or no client
            was scored in all runs.
        UserError: by tier, and a client is not in the same tier in all runs.
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
    clients = _of_all(evaluations)
    if not clients[_BASE]:
        raise RunDirectoryError(
            f"{', '.join(map(str, runs.values()))}: no client was scored in all of them; compare "
            "runs of the same data, clients.split_seed and evaluation"
        )
    if by == "tier":
        _refuse_other_tiers(clients, runs)
    columns = {name: scores_by_group(scored) for name, scored in clients.items()}
    shown = set.intersection(*(set(means) for means in columns.values()))
    tables = [
        text_table(
            f"{title} on test rows of the same clients",
            ["clients", *columns],
            [
                [name, *(number(getattr(means[name], key)) for means in columns.values())]
                for name in columns[_BASE]
                if name in shown and (by == "tier" or name in GROUPS.values())
            ],
        )
        for title, key in _SCORES
    ]
    return "\n\n".join([*tables, *_last_tables(runs)])


def _of_all(evaluations: Mapping[str, EvaluationRecord]) -> dict[str, list[ClientScores]]:
    """Return the clients of each evaluation that all evaluations scored."""
    scored = [{client.client for client in each.clients} for each in evaluations.values()]
    in_all = set.intersection(*scored)
    return {
        name: [client for client in each.clients if client.client in in_all]
        for name, each in evaluations.items()
    }


def _refuse_other_tiers(
    clients: Mapping[str, list[ClientScores]], runs: Mapping[str, Path]
) -> None:
    first, *others = runs
    tiers = {client.client: client.tier for client in clients[first]}
    for name in others:
        for client in clients[name]:
            if client.tier != tiers[client.client]:
                raise UserError(
                    f"{runs[name]}: client {client.client} is in tier {client.tier}, in "
                    f"{runs[first]} in tier {tiers[client.client]}; compare without tiers: --by "
                    "group, or give all runs the same names in clients.tiers and the same "
                    "clients.tier_seed (their ranks may differ)"
                )


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
