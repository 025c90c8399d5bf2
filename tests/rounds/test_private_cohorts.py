"""A run of private clients with Poisson cohorts, of which some are empty."""

from pathlib import Path

import pytest

from fedllm.cli.execution import start
from fedllm.errors import UserError
from fedllm.storage.paths import RunPaths
from fedllm.storage.records import AggregateRecord, CohortRecord, RoundRecord
from tests.tiny import Tiny

POISSON = "clients.cohort={count: 2, sampling: poisson}"
PRIVATE = ["privacy.clip_norm=0.1", "aggregation.weights=uniform"]
SHORT = ["seed=3", "rounds=3", "training.max_steps=1", "evaluation.every=0"]


def test_a_round_without_clients_costs_privacy_and_moves_the_state(
    tiny: Tiny, tmp_path: Path
) -> None:
    options = [POISSON, *PRIVATE, *SHORT, "method.options.truncated=keep"]
    run = RunPaths(root=start(tiny.config, options, tmp_path / "run"))
    rounds = [run.round(number) for number in (1, 2, 3)]
    sizes = [len(CohortRecord.read(paths.cohort).clients) for paths in rounds]
    assert 0 in sizes and any(sizes)
    records = [AggregateRecord.read(paths.aggregate_record) for paths in rounds]
    assert [record.clients for record in records] == sizes
    assert len({record.sha256 for record in records}) == 3
    spent = [record.privacy.epsilon for record in records if record.privacy]
    assert len(spent) == 3
    assert 0 < spent[0] < spent[1] < spent[2]
    assert all(RoundRecord.find(paths.record) for paths in rounds)


def test_without_noise_such_cohorts_are_refused_before_the_run(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"poisson expects 2 clients .* or privacy.clip_norm"):
        start(tiny.config, [POISSON, *SHORT], tmp_path / "run")
