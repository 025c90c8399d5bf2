"""Methods by name, their settings, local rules, weights."""

import dataclasses
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import ConfigError, DataError
from fedllm.methods.catalog import METHODS, build_method, check_names, method_class
from fedllm.methods.factor_mean import FactorMean
from fedllm.methods.flexlora import FlexLora
from fedllm.methods.local_sides import LOCAL_RULES
from fedllm.methods.weights import amounts, total_of


class Demanding(FlexLora):
    """A user's own method that wants more than the settings there are."""

    def __init__(self, *, seed: int, alpha: float, scaling: str, temperature: float) -> None:
        super().__init__(seed=seed, alpha=alpha * temperature, scaling=scaling)


class Refusing(FlexLora):
    """A user's own method that insists on settings that nobody gives."""

    def __init__(self, *, seed: int, alpha: float, scaling: str) -> None:
        raise ValueError(f"nothing pleases it: {seed} {alpha} {scaling}")


def build(name: str) -> object:
    return build_method(name, seed=1, alpha=16.0, scaling="fixed")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_the_name_it_bears(name: str) -> None:
    method = build(name)
    assert isinstance(method, method_class(name))
    assert (method_class(name).name, method_class(name).kind) == (name, "lora")


def test_a_method_of_ones_own_is_named_by_its_path() -> None:
    assert method_class("fedllm.methods.flexlora:FlexLora") is FlexLora
    assert isinstance(build("fedllm.methods.flexlora:FlexLora"), FlexLora)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "flexlorra",
            r"'flexlorra' \(did you mean flexlora\?\), need one of flexlora, factor_mean",
        ),
        ("zebra", r"got 'zebra', need one of flexlora, factor_mean or your own"),
        ("no.such.module:Class", "cannot import 'no.such.module:Class'"),
        ("fedllm.methods.flexlora:Nothing", "has no attribute 'Nothing'"),
        (":Class", "cannot import ':Class'"),
        ("fedllm.methods.local_sides:LocalRule", "lacks base_delta, finish, fold, kind"),
        ("fedllm.methods.catalog:METHODS", "lacks base_delta"),
    ],
)
def test_a_method_that_is_none_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^method.name: .*{message}") as refused:
        method_class(name)
    assert "\n" not in str(refused.value)


def test_an_object_that_is_not_a_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not a class"):
        method_class(f"{__name__}:INSTANCE")


INSTANCE = FactorMean(seed=1, alpha=16.0)


def test_a_method_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Demanding cannot be made: .*temperature"):
        build(f"{__name__}:Demanding")
    with pytest.raises(ConfigError, match="nothing pleases it"):
        build(f"{__name__}:Refusing")


def test_an_unknown_local_rule_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"method.local: got 'fedot' \(did you mean fedit\?\)"):
        check_names("flexlora", "fedot")


def test_the_optimizer_follows_from_the_local_rule() -> None:
    assert LOCAL_RULES["fedavg"].optimizer == "sgd"
    assert LOCAL_RULES["fedit"].optimizer == "adamw"
    rule = LOCAL_RULES["fedit"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.eps = 1.0  # type: ignore[misc]


@given(st.lists(st.integers(0, 10**6)))
def test_a_weight_follows_from_its_own_client_alone(rows: list[int]) -> None:
    assert amounts(rows) == [amounts([n])[0] for n in rows]
    assert amounts(rows) == rows


@given(st.lists(st.floats(0, 1e6), min_size=1).filter(any), st.randoms())
def test_the_total_is_the_same_in_any_order(weights: list[float], draw: random.Random) -> None:
    shuffled = draw.sample(weights, len(weights))
    assert total_of(shuffled) == total_of(weights) == math.fsum(weights)


@pytest.mark.parametrize("rows", [[1, -1], [1, math.nan], [math.inf]])
def test_weights_that_mean_nothing_are_refused(rows: list[float]) -> None:
    with pytest.raises(DataError, match="weight"):
        amounts(rows)


@pytest.mark.parametrize("weights", [[], [0, 0]])
def test_weights_that_are_all_zero_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights are zero"):
        total_of(weights)
