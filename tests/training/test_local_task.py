"""A method says what trains: one factor, columns beside frozen ones, a term in addition."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fedllm.config.models import TrainingSection
from fedllm.lora.entries import entry_places, with_entries
from fedllm.lora.factors import Adapter, Factors, delta
from fedllm.methods.local_rules import LOCAL_RULES, LocalRule
from fedllm.methods.local_task import LocalTask, TrainedFactors
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings, TrainResult, train_client
from fedllm.training.progress import Progress
from fedllm.training.step_plan import Draws
from fedllm.training.together import Together
from fedllm.training.trainer_protocol import Member
from tests.tiny import Tiny
from tests.training.test_loop import TARGETS, rows_of, start, with_frozen

Make = Callable[..., AdapterSlots]
SGD = replace(LOCAL_RULES["fedavg"])


@pytest.fixture(scope="module")
def make(tiny: Tiny) -> Make:
    def build(dropout: float = 0.0) -> AdapterSlots:
        base = load_base(tiny.model, dtype="float32", device="cpu")
        return AdapterSlots(base, target_modules=TARGETS, dropout=dropout, layout="parts")

    return build


@pytest.fixture(scope="module")
def slots(make: Make) -> AdapterSlots:
    return make()


def settings(
    trained: TrainedFactors = "AB", rule: LocalRule = LOCAL_RULES["fedit"], **changes: object
) -> LocalSettings:
    section = {"batch_size": 4, "max_steps": 3, "learning_rate": 0.01, **changes}
    return LocalSettings(
        training=TrainingSection.model_validate(section),
        rule=rule,
        task=LocalTask(trained=trained),
    )


def begun(slots: AdapterSlots) -> Adapter:
    """Factors that both have gradients."""
    draws = torch.Generator().manual_seed(7)
    return {
        module: replace(own, b_OR=torch.randn(own.b_OR.shape, generator=draws) / 8)
        for module, own in start(slots).items()
    }


def train(slots: AdapterSlots, given: LocalSettings, adapter: Adapter | None = None) -> TrainResult:
    draws = Draws(seed=0, round=1, client="0")
    return train_client(slots, adapter or begun(slots), rows_of(0), settings=given, draws=draws)


def same(left: TrainResult, right: TrainResult) -> bool:
    return left.stats.losses == right.stats.losses and all(
        torch.equal(f.a_RI, right.adapter[m].a_RI) and torch.equal(f.b_OR, right.adapter[m].b_OR)
        for m, f in left.adapter.items()
    )


# --- one factor


@pytest.mark.parametrize(("trained", "kept"), [("B", "a_RI"), ("A", "b_OR")])
def test_a_frozen_factor_stays_and_the_other_trains(
    slots: AdapterSlots, trained: TrainedFactors, kept: str
) -> None:
    result = train(slots, settings(trained))
    moved = {"a_RI": "b_OR", "b_OR": "a_RI"}[kept]
    for module, own in begun(slots).items():
        assert torch.equal(getattr(result.adapter[module], kept), getattr(own, kept))
        assert not torch.equal(getattr(result.adapter[module], moved), getattr(own, moved))
    assert set(result.norms) == set(result.adapter)


def test_the_first_step_of_a_factor_is_that_of_both(slots: AdapterSlots) -> None:
    both = train(slots, settings(rule=SGD, max_steps=1, clip_norm=None))
    factors: dict[TrainedFactors, str] = {"B": "b_OR", "A": "a_RI"}
    for trained, moved in factors.items():
        one = train(slots, settings(trained, SGD, max_steps=1, clip_norm=None))
        assert one.stats.losses == both.stats.losses
        for module, own in one.adapter.items():
            assert torch.equal(getattr(own, moved), getattr(both.adapter[module], moved))


def test_after_a_frozen_factor_all_train_again(make: Make) -> None:
    fresh, used = make(), make()
    train(used, settings("B"))
    train(used, settings("A"))
    assert same(train(used, settings()), train(fresh, settings()))


@pytest.mark.parametrize("trained", ["A", "B", "C"])
def test_a_training_of_one_factor_resumes_to_the_same_bits(
    slots: AdapterSlots, trained: TrainedFactors
) -> None:
    whole, rest = interrupted(slots, settings(trained))
    assert same(whole, rest)


def interrupted(slots: AdapterSlots, given: LocalSettings) -> tuple[TrainResult, TrainResult]:
    """A training, and one that goes on from a copy of its progress before the last step."""
    kept: list[Progress] = []

    def keep(step: int, snapshot: Callable[[], Progress]) -> None:
        if step == 1:
            found = snapshot()
            copies = {name: t.clone() for name, t in found.tensors.items()}
            kept.append(replace(found, tensors=copies))

    draws = Draws(seed=0, round=1, client="0")
    run = partial(train_client, slots, begun(slots), rows_of(0), settings=given, draws=draws)
    whole = run(before_step=keep)
    assert kept[0].fits(begun(slots), given.task.trained)
    assert kept[0].fits(begun(slots)) is (given.task.trained == "AB")
    return whole, run(progress=kept[0])


# --- a core between B and A


def test_a_core_trains_between_the_factors_as_they_were(slots: AdapterSlots) -> None:
    result = train(slots, settings("C"))
    for module, own in begun(slots).items():
        got = result.adapter[module]
        assert torch.equal(got.a_RI, own.a_RI)
        # B C: nothing beyond the columns of B
        core = torch.linalg.lstsq(own.b_OR.double(), got.b_OR.double()).solution
        torch.testing.assert_close(own.b_OR.double() @ core, got.b_OR.double(), atol=1e-5, rtol=0)
        assert float((core - torch.eye(len(core))).abs().max()) > 1e-3


def test_a_step_of_the_core_is_gradient_descent_on_it(slots: AdapterSlots) -> None:
    rate = 0.05
    keys: dict[str, Any] = {"max_steps": 1, "clip_norm": None, "schedule": "constant"}
    of_b = train(slots, settings("B", SGD, learning_rate=rate, **keys))
    of_core = train(slots, settings("C", SGD, learning_rate=rate, **keys))
    for module, own in begun(slots).items():
        # dL/dC = B^T dL/dB, and dL/dB is what one step of B shows
        gradient = (own.b_OR - of_b.adapter[module].b_OR) / rate
        core = torch.eye(own.rank) - rate * own.b_OR.T @ gradient
        expected = own.b_OR @ core
        torch.testing.assert_close(of_core.adapter[module].b_OR, expected, atol=1e-6, rtol=1e-4)


# --- frozen columns


def with_tail(slots: AdapterSlots) -> Adapter:
    return with_frozen(begun(slots), 2)


def merged(slots: AdapterSlots, adapter: Adapter) -> Adapter:
    """The frozen factors are added to the base; what is left is the rest."""
    for module, own in adapter.items():
        assert own.frozen is not None
        layer = slots.model.get_submodule(module)
        inner = getattr(layer, "base_layer", layer)
        assert isinstance(inner, nn.Linear)
        inner.weight.data += delta(own.frozen).float()
    return {module: replace(own, frozen=None) for module, own in adapter.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_frozen_columns_count_as_the_base(make: Make, dropout: float) -> None:
    beside, inside = make(dropout), make(dropout)
    adapter = with_tail(beside)
    given = settings(rule=SGD)
    tail, base = train(beside, given, adapter), train(inside, given, merged(inside, adapter))
    assert tail.stats.losses == pytest.approx(base.stats.losses, abs=2e-5)
    for module, own in tail.adapter.items():
        assert own.frozen is None
        torch.testing.assert_close(own.a_RI, base.adapter[module].a_RI, atol=2e-5, rtol=0)
        torch.testing.assert_close(own.b_OR, base.adapter[module].b_OR, atol=2e-5, rtol=0)


def test_frozen_columns_are_gone_with_the_next_client(make: Make) -> None:
    fresh, used = make(), make()
    train(used, settings(), with_tail(used))
    assert same(train(used, settings()), train(fresh, settings()))


# --- a proximal term


def test_the_proximal_term_draws_back_to_what_was_received(slots: AdapterSlots) -> None:
    rate, mu = 0.05, 0.5
    keys: dict[str, Any] = {"schedule": "constant", "learning_rate": rate, "clip_norm": None}
    first = train(slots, settings(rule=SGD, max_steps=1, **keys))
    free = train(slots, settings(rule=SGD, max_steps=2, **keys))
    drawn = train(slots, settings(rule=replace(SGD, mu=mu), max_steps=2, **keys))
    for module, own in begun(slots).items():
        for factor in ("a_RI", "b_OR"):
            moved = getattr(first.adapter[module], factor) - getattr(own, factor)
            expected = getattr(free.adapter[module], factor) - rate * mu * moved
            torch.testing.assert_close(
                getattr(drawn.adapter[module], factor), expected, atol=1e-6, rtol=1e-5
            )


def test_a_proximal_training_resumes_to_the_same_bits(slots: AdapterSlots) -> None:
    whole, rest = interrupted(slots, settings(rule=replace(LOCAL_RULES["fedit"], mu=0.5)))
    assert same(whole, rest)


def test_a_penalty_draws_the_last_directions_to_zero(slots: AdapterSlots) -> None:
    rate, weight = 0.05, 0.5
    keys: dict[str, Any] = {"schedule": "constant", "learning_rate": rate, "clip_norm": None}
    given = settings(rule=SGD, max_steps=1, **keys)
    free = train(slots, given)
    task = LocalTask(tail_penalty=weight, tail_share=0.5)  # of rank 3 the last two
    drawn = train(slots, replace(given, task=task))
    for module, own in begun(slots).items():
        a, b = own.a_RI[1:], own.b_OR[:, 1:]
        expected_a, expected_b = (
            f.clone() for f in (free.adapter[module].a_RI, free.adapter[module].b_OR)
        )
        expected_a[1:] -= rate * weight * b.norm() * a / a.norm()
        expected_b[:, 1:] -= rate * weight * a.norm() * b / b.norm()
        torch.testing.assert_close(drawn.adapter[module].a_RI, expected_a, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(drawn.adapter[module].b_OR, expected_b, atol=1e-6, rtol=1e-5)


# --- the other engines


def members(adapters: list[Adapter]) -> Iterator[Member]:
    for client, adapter in enumerate(adapters):
        draws = Draws(seed=0, round=1, client=str(client))
        yield Member(received=partial(dict, adapter), rows=rows_of(client), draws=draws)


@pytest.mark.parametrize(
    ("task", "mu", "tailed"),
    [
        (LocalTask(trained="B"), 0.0, False),
        (LocalTask(trained="A"), 0.3, True),
        (LocalTask(), 0.3, True),
        (LocalTask(trained="C"), 0.3, True),
        (LocalTask(entries_seed=5), 0.3, True),
    ],
)
def test_together_clients_train_as_each_alone(
    slots: AdapterSlots, task: LocalTask, mu: float, tailed: bool
) -> None:
    given = replace(settings(rule=replace(SGD, mu=mu)), task=task)
    whole, tail = begun(slots), with_tail(slots)
    # one of them has no frozen columns
    adapters = [tail, whole] if tailed else [whole, whole]
    group = Together(slots=slots, settings=given).train(list(members(adapters)))
    for member, result in zip(members(adapters), group, strict=True):
        alone = train_client(
            slots, member.received(), member.rows, settings=given, draws=member.draws
        )
        assert result.stats.losses == pytest.approx(alone.stats.losses, abs=2e-5)
        for module, own in alone.adapter.items():
            torch.testing.assert_close(result.adapter[module].a_RI, own.a_RI, atol=2e-5, rtol=0)
            torch.testing.assert_close(result.adapter[module].b_OR, own.b_OR, atol=2e-5, rtol=0)


# --- entries of the weights

ENTRIES = LocalTask(entries_seed=5)


def zeros(slots: AdapterSlots) -> Adapter:
    return {
        m: replace(f, a_RI=torch.zeros_like(f.a_RI), b_OR=torch.zeros_like(f.b_OR))
        for m, f in start(slots).items()
    }


def entries(own: Factors) -> torch.Tensor:
    places = entry_places(seed=5, shape=own.shape, rank=own.rank)
    return with_entries(own.a_RI, own.b_OR, places)


def test_a_step_of_entries_is_gradient_descent_on_the_weights(make: Make) -> None:
    rate = 0.05
    keys: dict[str, Any] = {"max_steps": 1, "clip_norm": None, "schedule": "constant"}
    given = settings(rule=SGD, learning_rate=rate, **keys)
    slots = make(dropout=0.3)  # entries have none
    sparse = train(slots, replace(given, task=ENTRIES), zeros(slots))
    plain = make()
    # the gradient of a whole weight: what one step of B shows where A is the identity
    whole = {
        m: Factors(a_RI=torch.eye(f.shape.in_), b_OR=torch.zeros(f.shape.out, f.shape.in_), scale=1)
        for m, f in start(plain).items()
    }
    dense = train(plain, replace(given, task=LocalTask(trained="B")), whole)
    assert sparse.stats.losses == pytest.approx(dense.stats.losses, abs=1e-6)
    for module, own in sparse.adapter.items():
        places = entry_places(seed=5, shape=own.shape, rank=own.rank)
        expected = torch.zeros(own.shape.out * own.shape.in_)
        expected[places] = dense.adapter[module].b_OR.flatten()[places]
        assert expected.any()
        torch.testing.assert_close(entries(own).flatten(), expected, atol=1e-6, rtol=1e-4)


def test_entries_count_as_the_base(slots: AdapterSlots, make: Make) -> None:
    given = replace(settings(rule=SGD, max_steps=1), task=ENTRIES)
    adapter = begun(slots)  # entries that are not zero
    other = make()
    for module, own in adapter.items():
        layer = other.model.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        layer.weight.data += entries(own)
    beside, inside = train(slots, given, adapter), train(other, given, zeros(other))
    assert beside.stats.losses == pytest.approx(inside.stats.losses, abs=2e-5)
    for module, own in beside.adapter.items():
        moved = entries(own) - entries(adapter[module])
        torch.testing.assert_close(moved, entries(inside.adapter[module]), atol=2e-5, rtol=0)


def test_after_entries_factors_train_again(make: Make) -> None:
    fresh, used = make(), make()
    train(used, replace(settings(), task=ENTRIES))
    assert same(train(used, settings()), train(fresh, settings()))


def test_a_training_of_entries_resumes_to_the_same_bits(slots: AdapterSlots) -> None:
    whole, rest = interrupted(slots, replace(settings(), task=ENTRIES))
    assert same(whole, rest)
