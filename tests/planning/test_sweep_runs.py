"""A sweep's file becomes runs, or one line says why they could not be compared."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedllm.config.loading import load_changed
from fedllm.config.sweep_files import is_sweep_file, load_sweep
from fedllm.errors import ConfigError
from fedllm.planning.roles import Roles
from fedllm.planning.sweeps.sweep_runs import (
    NOISE_ARM,
    SweepRun,
    best_rate,
    expand,
    refuse_leaks,
)
from fedllm.storage.paths import shipped

BASE = {
    "model": {"path": "embedded"},
    "data": {"path": "embedded"},
    "clients": {"tiers": {"small": {"ranks": 2}, "large": {"ranks": 8}}, "unseen": 2},
}
ARMS = {"flexlora": {}, "factor mean": {"method.name": "factor_mean"}}

Expand = Callable[..., list[SweepRun]]


@pytest.fixture
def runs_of(tmp_path: Path) -> Expand:
    """Expand a sweep of these keys over a small base."""

    def expanded(**keys: object) -> list[SweepRun]:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        path = tmp_path / "sweep.yaml"
        raw = {"base": "base.yaml", "arms": ARMS, **keys}
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        file = load_sweep(path)
        return expand(file, lambda changes: load_changed(file.base, changes))

    return expanded


def refused(runs_of: Expand, **keys: object) -> str:
    with pytest.raises(ConfigError) as error:
        runs_of(**keys)
    (line,) = str(error.value).splitlines()
    return line


def test_every_seed_of_all_arms_comes_in_turn(runs_of: Expand) -> None:
    runs = runs_of(seeds=[0, 7])
    assert [run.name for run in runs] == [
        "runs/flexlora/seed-0",
        "runs/factor_mean/seed-0",
        "runs/flexlora/seed-7",
        "runs/factor_mean/seed-7",
    ]
    assert [run.config.seed for run in runs] == [0, 0, 7, 7]
    assert [run.config.method.name for run in runs[:2]] == ["flexlora", "factor_mean"]


def test_a_grid_makes_every_arm_at_every_point(runs_of: Expand) -> None:
    runs = runs_of(grid={"training.max_steps": [2, 4], "lora.alpha": [8]})
    assert {run.arm: run.config.training.max_steps for run in runs} == {
        "flexlora max_steps=2 alpha=8": 2,
        "flexlora max_steps=4 alpha=8": 4,
        "factor mean max_steps=2 alpha=8": 2,
        "factor mean max_steps=4 alpha=8": 4,
    }


def test_a_grid_alone_needs_no_arms(runs_of: Expand) -> None:
    assert [run.arm for run in runs_of(arms={}, grid={"clients.quorum": ["all", 0.5]})] == [
        "quorum=all",
        "quorum=0.5",
    ]


def test_every_arm_tries_every_rate_for_as_many_rounds_with_a_seed_of_its_own(
    runs_of: Expand,
) -> None:
    runs = runs_of(
        set={"clients.dev": 2}, tuning={"learning_rates": [0.01, 0.001], "rounds": 1, "seed": 99}
    )
    tuning = [run for run in runs if run.phase == "tuning"]
    assert [(run.arm, run.rate, run.config.training.learning_rate) for run in tuning] == [
        (arm, rate, rate) for arm in ARMS for rate in (0.001, 0.01)
    ]
    assert {(run.config.rounds, run.config.seed) for run in tuning} == {(1, 99)}
    assert runs[: len(tuning)] == tuning


@pytest.mark.parametrize("contrast", [None, ["factor mean", "flexlora"]])
def test_further_seeds_are_of_the_two_arms_of_the_contrast_alone(
    runs_of: Expand, contrast: list[str] | None
) -> None:
    third = {"flexlora": {}, "factor mean": {"method.name": "factor_mean"}}
    third["raflora"] = {"method.name": "raflora"}
    comparison = {"contrast": contrast, "contrast_seeds": [3, 4]}
    runs = runs_of(arms=third, seeds=[0, 1], comparison=comparison)
    seeds = {arm: [run.config.seed for run in runs if run.arm == arm] for arm in third}
    assert seeds == {"flexlora": [0, 1, 3, 4], "factor mean": [0, 1, 3, 4], "raflora": [0, 1]}
    assert [run.config.seed for run in runs] == [0, 0, 0, 1, 1, 1, 3, 3, 4, 4]


def test_the_noise_floor_is_the_same_arm_with_other_seeds(runs_of: Expand) -> None:
    runs = runs_of(noise_floor={"arm": "flexlora", "seeds": [5, 6]})
    noise = [run for run in runs if run.arm == NOISE_ARM]
    assert [run.config for run in noise] == [
        runs[0].config.model_copy(update={"seed": seed}) for seed in (5, 6)
    ]
    assert noise[0].name == "runs/A-A/seed-5"


def test_an_arm_without_a_difference_is_refused(runs_of: Expand) -> None:
    line = refused(runs_of, arms={"a": {}, "b": {"scheduler.workers": 5}})
    assert line.startswith("arms.b: no difference from arm a; change a key that decides")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clients.split_seed", 4),
        ("clients.unseen", 3),
        ("data.test_fraction", 0.5),
        ("clients.held_out_from", ["ana", "ben"]),
        ("data.path", "other.jsonl"),
    ],
)
def test_an_arm_that_would_train_on_what_others_hold_out_is_refused(
    runs_of: Expand, key: str, value: object
) -> None:
    line = refused(runs_of, arms={"a": {}, "b": {key: value}})
    assert line.startswith(f"arms.b: {key} is ")
    assert line.endswith("it would train on rows that the other holds out; put it in `set`")


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"seeds": [1, 1]}, "seeds: got a seed twice"),
        ({"noise_floor": {"arm": "x", "seeds": [5]}}, "noise_floor.arm: no arm 'x'; need one of"),
        ({"noise_floor": {"arm": "flexlora", "seeds": [0]}}, "noise_floor.seeds: 0 is one of"),
        ({"comparison": {"contrast_seeds": [0]}}, "comparison.contrast_seeds: 0 is one of `seeds`"),
        ({"comparison": {"contrast_seeds": [5, 5]}}, "contrast_seeds: got a seed twice"),
        ({"comparison": {"contrast": ["flexlora", "x"]}}, "comparison.contrast: no arm 'x'"),
        ({"set": {"clients.unseen": 0}}, "comparison: unseen_loss needs clients.unseen, which"),
        (
            {"comparison": {"endpoint": "new_category_loss"}},
            "comparison: new_category_loss needs clients.unseen_categories, which is empty",
        ),
        ({"set": {"evaluation.every": 0}}, "evaluation.every: got 0, a sweep compares"),
        ({"tuning": {"learning_rates": [0.1, 0.2]}}, "tuning: chooses by dev clients, but"),
        ({"arms": {"a/b": {}}}, "arms.a/b: need a name of letters"),
        ({"arms": {"a b": {}, "a_b": {}}}, "arms.a_b: another arm has the same folder"),
        ({"arms": {"a": {"seed": 3}}}, "arms.a.seed: the sweep's `seeds` set it"),
        ({"grid": {"lora.alpha": [8, 8]}}, "grid.lora.alpha: got 8, 8; need different values"),
        ({"grid": {"method.name": ["rbla"]}}, "arms.factor mean.method.name: `grid` sets it"),
        ({"arms": {"a": {"method.named": 3}}}, "arm a: method.named: unknown key; did you mean"),
        ({"arms": {}}, "arms: missing; give arms, a grid, or both"),
        ({"arm": {}}, "arm: unknown key; did you mean `arms`?"),
        ({"seeds": []}, "seeds: got [], need at least one"),
    ],
)
def test_a_sweep_that_cannot_be_compared_is_refused_in_one_line(
    runs_of: Expand, keys: dict[str, object], start: str
) -> None:
    assert start in refused(runs_of, **keys).splitlines()[0]


def test_tables_without_keys_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = tmp_path / "sweep.yaml"
    path.write_text("base: base.yaml\nset:\n  # rounds: 2\ngrid:\narms:\n  a:\n  b: {rounds: 9}\n")
    file = load_sweep(path)
    runs = expand(file, lambda changes: load_changed(file.base, changes))
    assert [(run.arm, run.config.rounds) for run in runs] == [("a", 3), ("b", 9)]


def test_arms_that_hold_out_other_clients_are_refused_once_the_data_are_known() -> None:
    one = Roles(train=("a", "b"), dev=("c",), unseen=("d",))
    refuse_leaks({"x": one, "y": one})
    with pytest.raises(ConfigError, match=r"arms\.x: trains on client b, which arm y holds out"):
        refuse_leaks({"x": one, "y": Roles(train=("a", "c"), dev=("b",), unseen=("d",))})


def test_the_best_rate_has_the_lowest_loss_and_a_diverged_one_never_wins() -> None:
    inf, nan = float("inf"), float("nan")
    assert best_rate({0.1: 2.0, 0.01: 1.0, 1.0: nan, 3.0: inf}) == 0.01
    assert best_rate({0.1: 1.0, 0.01: 1.0}) == 0.01
    assert best_rate({0.1: nan}) is None


def test_the_shipped_example_is_a_sweep_over_a_shipped_configuration() -> None:
    path = shipped("configs/sweeps/example.yaml")
    file = load_sweep(path)
    base = shipped("configs/quickstart.yaml")
    runs = expand(file, lambda changes: load_changed(base, changes))
    assert len(runs) == 4 + 9
    assert is_sweep_file(path) and not is_sweep_file(base)
