"""Methods by name, their settings, local rules, weights."""

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from fedllm.config.models import MethodSection, Section
from fedllm.errors import ConfigError, DataError
from fedllm.methods.catalog import (
    METHODS,
    build_method,
    check_method,
    check_names,
    method_class,
)
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.methods.pairs.factor_mean import FactorMean
from fedllm.methods.spectral.flexlora import FlexLora
from fedllm.methods.weights import amounts, total_of


class Demanding(FlexLora):
    """A user's own method that wants more than the settings there are."""

    def __init__(self, *, seed: int, alpha: float, scaling: str, temperature: float) -> None:
        super().__init__(seed=seed, alpha=alpha * temperature, scaling=scaling)


class Refusing(FlexLora):
    """A user's own method that insists on settings that nobody gives."""

    def __init__(self, *, seed: int, alpha: float, scaling: str) -> None:
        raise ValueError(f"nothing pleases it: {seed} {alpha} {scaling}")


class ForgettingOptions(Section):
    """Options of a user's own method."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    kind: Literal["slow", "fast"] = "slow"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetting(FactorMean):
    """A user's own method with options."""

    options_class: ClassVar[type[ForgettingOptions]] = ForgettingOptions

    options: ForgettingOptions = dataclasses.field(default_factory=ForgettingOptions)


OWN = f"{__name__}:Forgetting"


def build(name: str, options: Mapping[str, object] | None = None) -> object:
    return build_method(name, seed=1, alpha=16.0, scaling="fixed", options=options)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_the_name_it_bears(name: str) -> None:
    method = build(name)
    assert isinstance(method, method_class(name))
    assert (method_class(name).name, method_class(name).kind) == (name, "lora")


def test_a_method_of_ones_own_is_named_by_its_path() -> None:
    assert method_class("fedllm.methods.spectral.flexlora:FlexLora") is FlexLora
    assert isinstance(build("fedllm.methods.spectral.flexlora:FlexLora"), FlexLora)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "flexlorra",
            r"'flexlorra' \(did you mean flexlora\?\), need one of flexlora, raflora, ",
        ),
        ("quick", r"got 'quick', need one of flexlora, .*, lora_fair, .* or your own"),
        ("fedavg", "a value of method.local; the server side of FedAvg and FedIT is factor_mean$"),
        ("no.such.module:Class", "cannot import 'no.such.module:Class'"),
        ("fedllm.methods.spectral.flexlora:Nothing", "has no attribute 'Nothing'"),
        (":Class", "cannot import ':Class'"),
        (
            "fedllm.methods.local_rules:LocalRule",
            r"lacks assign, base_delta, .*finish, fold, .*kind",
        ),
        ("fedllm.methods.catalog:METHODS", "lacks assign, base_delta"),
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


def test_a_method_of_ones_own_gets_its_own_options() -> None:
    method = build(OWN, {"share": "0.25"})
    assert isinstance(method, Forgetting)
    assert method.options == ForgettingOptions(share=0.25, kind="slow")
    assert build(OWN) == build(OWN, {}) == Forgetting(seed=1, alpha=16.0)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"shar": 1}, ["shar: unknown option; did you mean `method.options.share`?"]),
        ({"zebra": 1}, [f"zebra: unknown option; {OWN} has share, kind"]),
        ({"share": 2}, ["share: got 2, need <= 1"]),
        ({"kind": "quick"}, ["kind: got 'quick', need 'slow' or 'fast'"]),
        ({"kid": 1, "share": None}, ["kid: unknown option", "share: got None, need a number"]),
    ],
)
def test_wrong_options_are_refused_all_at_once(
    options: Mapping[str, object], lines: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        build(OWN, options)
    found = str(refused.value).splitlines()
    assert len(found) == len(lines)
    for line, words in zip(found, lines, strict=True):
        assert line.startswith(f"method.options.{words}")


def test_a_method_without_options_takes_none() -> None:
    section = MethodSection(name="factor_mean", options={"zebra": 1})
    words = r"^method.options.zebra: unknown option; factor_mean has no options$"
    with pytest.raises(ConfigError, match=words):
        build(section.name, section.options)
    with pytest.raises(ConfigError, match=words):
        check_method(section)
    # a user's own class is not imported here
    check_method(MethodSection(name="no.such:Class", options={"zebra": 1}))


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
