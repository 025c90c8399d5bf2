"""Runs on the same clients side by side: `python -m fedllm.reporting.comparison NAME=RUN ...`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedllm.config.loading import read_config
from fedllm.errors import RunDirectoryError
from fedllm.reporting.summary import (
    bytes_table,
    last_evaluation,
    rank_table,
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

_SCORES = (("answer loss", "loss"), ("Rouge-L", "rouge_l"), ("exact match", "exact_match"))


def compare(runs: Mapping[str, Path]) -> str:
    """Return the base and the last evaluation of several runs per tier of the last run.

    Raises:
        RunDirectoryError: a run has no evaluation of its base or its end.
    """
    evaluations: dict[str, EvaluationRecord] = {}
    for name, root in runs.items():
        paths = RunPaths(root=root)
        base = EvaluationRecord.find(paths.round(0).evaluation_record)
        last = last_evaluation(paths, read_config(paths.config).rounds)
        if base is None or last is None or not last.round:
            raise RunDirectoryError(f"{root}: not evaluated at start and end; resume the run")
        evaluations.setdefault("base", base)
        evaluations[name] = last
    tiers = {score.client: score.tier for score in last.clients}
    columns = {name: scores_by_tier(_in_tiers(e, tiers)) for name, e in evaluations.items()}
    tables = [
        text_table(
            f"{title} per tier, on test rows of the same clients",
            ["tier", *columns],
            [
                [tier, *(number(getattr(means[tier], key)) for means in columns.values())]
                for tier in next(iter(columns.values()))
            ],
        )
        for title, key in _SCORES
    ]
    return "\n\n".join([*tables, *_last_tables(list(runs.values())[-1])])


def _in_tiers(evaluation: EvaluationRecord, tiers: Mapping[str, str]) -> EvaluationRecord:
    """Return the evaluation with clients grouped by the tiers of another run."""
    clients = [
        client.model_copy(update={"tier": tiers[client.client]})
        for client in evaluation.clients
        if client.client in tiers
    ]
    return evaluation.model_copy(update={"clients": clients})


def _last_tables(root: Path) -> list[str]:
    paths = RunPaths(root=root)
    last = paths.round(read_config(paths.config).rounds)
    return [
        rank_table(AggregateRecord.read(last.aggregate_record)),
        bytes_table(CohortRecord.read(last.cohort), PreparedRecord.read(paths.prepared)),
    ]


def main(arguments: Sequence[str]) -> None:
    """Print the comparison of `NAME=RUN` arguments."""
    runs = {name: Path(root) for name, _, root in (a.partition("=") for a in arguments)}
    sys.stdout.write(f"{compare(runs)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
