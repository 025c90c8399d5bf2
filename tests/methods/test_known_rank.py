"""The benchmark with a known optimum measures what it says, on few seeds and rounds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from benchmarks.known_rank import (
    COHORT,
    LEARNING_RATE,
    RANKS,
    STEPS,
    Arm,
    Training,
    arms,
    cohort_of,
    federation_of,
    interval_of,
    rows_of,
    run_arms,
)
from fedllm.lora.factors import Factors
from fedllm.methods.catalog import METHODS, build_method
from fedllm.methods.local_task import LocalTask
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
    early, late = (run_arms([UNIFORM], 1, rounds)[0][0] for rounds in (1, 10))
    assert late.deployed < early.deployed < 1
    assert late.largest < early.largest < 1
    assert late.deployed > late.best_deployed > late.best_largest > 0
    assert list(late.beyond) == [1, 10]
    rows = list(rows_of(UNIFORM, [late]))
    assert [row[:2] for row in rows] == [
        ["uniform", "(the optimum's own)"],
        ["uniform", "flexlora"],
    ]


def test_arms_side_by_side_are_what_they_are_alone() -> None:
    strong = replace(UNIFORM, strength=2.0)
    together = run_arms([UNIFORM, strong], 2, 3)
    for arm, found in zip([UNIFORM, strong], together, strict=True):
        (alone,) = run_arms([arm], 2, 3)
        for one, other in zip(found, alone, strict=True):
            assert one.deployed == pytest.approx(other.deployed, rel=1e-4)
            assert one.bytes_a_round == other.bytes_a_round


@pytest.mark.parametrize("trained", ["AB", "A", "B"])
def test_steps_within_the_targets_spans_are_those_on_the_whole_matrices(
    trained: Literal["AB", "A", "B"],
) -> None:
    method = build_method("flexlora", seed=0, alpha=1.0, scaling="proportional")
    federation = federation_of(UNIFORM, method, 0)
    draw = torch.Generator().manual_seed(1)
    received = [
        Factors(
            a_RI=torch.randn(3, 256, generator=draw) / 16,
            b_OR=torch.randn(256, 3, generator=draw) / 16,
            scale=2.0,
        )
        for _ in range(2)
    ]
    training = Training(
        received=received,
        places=[(federation, 0), (federation, 5)],
        task=LocalTask(trained=trained),
    )
    change = torch.randn(64, 256, generator=draw) / 16
    in_base = federation.targets.left @ change
    for of_base, in_span in ((torch.zeros(256, 256), None), (in_base, change)):
        sent = training.updates([in_span, in_span])
        for (_, client), got, one in zip(training.places, received, sent, strict=True):
            a, b = got.a_RI, got.b_OR
            for _ in range(STEPS):
                rest = 2.0 * b @ a - (federation.targets.of(client) - of_base)
                of_a, of_b = 2.0 * b.mT @ rest, 2.0 * rest @ a.mT
                a = a - LEARNING_RATE * of_a if "A" in trained else a
                b = b - LEARNING_RATE * of_b if "B" in trained else b
            torch.testing.assert_close(one.a_RI, a, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(one.b_OR, b, atol=1e-5, rtol=1e-4)


def test_methods_see_the_same_clients_targets_and_cohorts() -> None:
    method = build_method("flexlora", seed=0, alpha=1.0, scaling="proportional")
    one, other = (
        federation_of(Arm(method=name, distribution="uniform", strength=0.5), method, 3)
        for name in ("flexlora", "factor_mean")
    )
    assert one.targets is other.targets
    assert one.rows == other.rows
    assert set(one.ranks) == set(RANKS)
    assert set(other.ranks) == {min(RANKS)}
    assert len(set(cohort_of(3, 1))) == COHORT
    assert cohort_of(3, 1) != cohort_of(3, 2)


def test_the_interval_holds_the_mean() -> None:
    mean, low, high = interval_of([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert 1.0 <= low <= mean <= high <= 3.0


def test_a_figure_of_saved_arms_is_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.known_rank_figure import main as draw

    saved = tmp_path / "saved.json"
    arms = [{"method": "flexlora", "options": [], "distribution": "uniform", "strength": 0.5}]
    seeds = [{"deployed": 0.5, "largest": 0.3}, {"deployed": 0.6, "largest": 0.4}]
    saved.write_text(json.dumps([{**arm, "seeds": seeds} for arm in arms]), "utf-8")
    for name in ("a.svg", "b.svg"):
        draw([str(saved), str(tmp_path / name)])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "uniform, weak own parts" in (tmp_path / "a.svg").read_text("utf-8")


def test_an_arm_that_diverges_says_so() -> None:
    assert list(rows_of(UNIFORM, [])) == [["uniform", "flexlora", "diverges", "", "", ""]]
