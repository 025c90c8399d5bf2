"""The benchmark with a known optimum measures what it says, on few seeds and rounds."""

import pytest
import torch

from benchmarks.known_rank import (
    COHORT,
    RANKS,
    Arm,
    arms,
    cohort_of,
    federation_of,
    interval,
    rows_of,
    run_arm,
)
from fedllm.methods.catalog import METHODS, build_method
from fedllm.planning.tiers import DISTRIBUTIONS

UNIFORM = Arm(method="flexlora", distribution="uniform", strength=0.5)


def test_every_method_runs_on_every_distribution_that_it_takes() -> None:
    found = {(arm.method, arm.distribution) for arm in arms()}
    for name, entry in METHODS.items():
        if entry.client_state != "none":
            assert name not in {method for method, _ in found}
            continue
        names = DISTRIBUTIONS if entry.ranks == "any" else ["uniform"]
        assert {distribution for method, distribution in found if method == name} == set(names)


def test_an_arm_moves_towards_the_optimum_and_no_further_than_its_ranks_allow() -> None:
    early, late = (run_arm(UNIFORM, 1, rounds)[0] for rounds in (1, 10))
    assert late.deployed < early.deployed < 1
    assert late.largest < early.largest < 1
    assert late.deployed > late.best_deployed > late.best_largest > 0
    assert list(late.beyond) == [1, 10]
    rows = list(rows_of(UNIFORM, [late]))
    assert [row[:2] for row in rows] == [
        ["uniform", "(the optimum's own)"],
        ["uniform", "flexlora"],
    ]


def test_methods_see_the_same_clients_targets_and_cohorts() -> None:
    method = build_method("flexlora", seed=0, alpha=1.0, scaling="proportional")
    one, other = (
        federation_of(Arm(method=name, distribution="uniform", strength=0.5), method, 3)
        for name in ("flexlora", "factor_mean")
    )
    assert torch.equal(one.left, other.left)
    assert one.rows == other.rows
    assert set(one.ranks) == set(RANKS)
    assert set(other.ranks) == {min(RANKS)}
    assert len(set(cohort_of(3, 1))) == COHORT
    assert cohort_of(3, 1) != cohort_of(3, 2)


def test_the_interval_holds_the_mean() -> None:
    mean, low, high = (
        float(part)
        for part in interval([1.0, 2.0, 3.0])
        .replace("(", "")
        .replace(")", "")
        .replace("-", " ")
        .split()
    )
    assert mean == pytest.approx(2.0)
    assert 1.0 <= low <= mean <= high <= 3.0


def test_an_arm_that_diverges_says_so() -> None:
    assert list(rows_of(UNIFORM, [])) == [["uniform", "flexlora", "diverges", "", "", ""]]
