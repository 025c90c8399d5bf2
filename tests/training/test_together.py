"""Clients that train together come to what each comes to alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from fedllm.config.models import TrainingSection
from fedllm.lora.factors import Adapter
from fedllm.methods.local_rules import LOCAL_RULES
from fedllm.model.base import load_base
from fedllm.packing.slots import AdapterSlots
from fedllm.training.loop import LocalSettings, TrainResult, train_client
from fedllm.training.progress import Progress
from fedllm.training.step_plan import Draws
from fedllm.training.together import Together
from fedllm.training.trainer_protocol import Member, StepHook
from tests.decoders import Row
from tests.tiny import Tiny
from tests.training.test_loop import TARGETS, rows_of, same, start

RANKS = (2, 3, 4)
COUNTS = (7, 3, 12)  # rows: 4, 2 and 6 steps
HEAD = list(range(40, 52))


@pytest.fixture(scope="module")
def make(tiny: Tiny) -> Callable[[float], AdapterSlots]:
    def build(dropout: float) -> AdapterSlots:
        base = load_base(tiny.model, dtype="float32", device="cpu")
        return AdapterSlots(base, target_modules=TARGETS, dropout=dropout, layout="parts")

    return build


@pytest.fixture(scope="module")
def slots(make: Callable[[float], AdapterSlots]) -> AdapterSlots:
    return make(0.0)


@pytest.fixture(scope="module")
def exact(make: Callable[[float], AdapterSlots]) -> AdapterSlots:
    return in_float64(make(0.0))


def in_float64(slots: AdapterSlots) -> AdapterSlots:
    """Everything that computes: the base, and the tensors that clients will train."""
    for member in slots.install_group([start(slots, rank) for rank in RANKS]):
        for parameter in member.parameters:
            parameter.data = parameter.data.double()
    for rank in RANKS:
        slots.install(start(slots, rank))
    slots.model.double()
    return slots


def settings(rule: str = "fedit", **changes: object) -> LocalSettings:
    section = {"batch_size": 2, "learning_rate": 0.01, "weight_decay": 0.01, **changes}
    return LocalSettings(training=TrainingSection.model_validate(section), rule=LOCAL_RULES[rule])


def members_of(slots: AdapterSlots) -> list[Member]:
    """Unequal ranks, steps and lengths; the rows of two clients have a prefix each."""
    heads: tuple[list[int], ...] = ([], HEAD, HEAD[::-1])
    return [
        Member(
            received=partial(start, slots, rank),
            rows=[Row(heads[n] + r.prompt_ids, r.answer_ids) for r in rows_of(n, count)],
            draws=Draws(seed=0, round=1, client=str(n)),
        )
        for n, (rank, count) in enumerate(zip(RANKS, COUNTS, strict=True))
    ]


def alone(
    slots: AdapterSlots, member: Member, given: LocalSettings
) -> tuple[TrainResult, Progress]:
    """A client by itself, and its state before its last step."""
    states: list[Progress] = []
    result = train_client(
        slots,
        member.received(),
        member.rows,
        settings=given,
        draws=member.draws,
        before_step=lambda _step, snapshot: states.append(copied(snapshot())),
    )
    return result, states[-1]


def copied(progress: Progress) -> Progress:
    tensors = {name: tensor.clone() for name, tensor in progress.tensors.items()}
    return replace(progress, tensors=tensors)


def snapshots(
    slots: AdapterSlots, members: Sequence[Member], given: LocalSettings
) -> tuple[list[TrainResult], list[list[Progress]]]:
    """The results, and the states of all before every step."""
    states: list[list[Progress]] = []
    results = Together(slots=slots, settings=given).train(
        members,
        before_step=lambda _step, found: states.append([copied(each) for each in found()]),
    )
    return results, states


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(
        found, expected, rtol=0.0, atol=bound * max(expected.abs().max().item(), 1e-3)
    )


@pytest.mark.parametrize(("rule", "bound"), [("fedavg", 1e-9), ("fedit", 1e-6)])
@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_member_trains_as_by_itself(
    exact: AdapterSlots, rule: str, bound: float, micro: int | None, checkpointing: bool
) -> None:
    given = settings(rule, micro_batch_size=micro, gradient_checkpointing=checkpointing)
    members = members_of(exact)
    results, states = snapshots(exact, members, given)
    assert [result.stats.steps for result in results] == [4, 2, 6]
    for n, member in enumerate(members):
        expected, before = alone(exact, member, given)
        found = states[before.step][n]
        assert found.step == before.step == expected.stats.steps - 1
        assert found.tensors.keys() == before.tensors.keys()
        for name, tensor in before.tensors.items():
            assert_close(found.tensors[name].double(), tensor.double(), bound)
        assert results[n].stats.losses == pytest.approx(expected.stats.losses, rel=1e-6)
        for key in ("rows", "steps", "tokens", "loss_tokens"):
            assert getattr(results[n].stats, key) == getattr(expected.stats, key)
        assert (results[n].scales, results[n].reason) == (expected.scales, expected.reason)
        for module, factors in expected.adapter.items():
            assert_close(results[n].adapter[module].b_OR, factors.b_OR, 1e-5)


def test_dropout_masks_are_those_of_each_member_by_itself(
    make: Callable[[float], AdapterSlots],
) -> None:
    slots = in_float64(make(0.2))
    members = members_of(slots)
    results = Together(slots=slots, settings=settings("fedavg")).train(members)
    for result, member in zip(results, members, strict=True):
        expected, _ = alone(slots, member, settings("fedavg"))
        assert result.stats.losses == pytest.approx(expected.stats.losses, rel=1e-6)


def with_nan(adapter: Adapter) -> Adapter:
    module = min(adapter)
    wrong = adapter[module].b_OR.clone()
    wrong[0, 0] = math.nan
    return {**adapter, module: replace(adapter[module], b_OR=wrong)}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_member_that_diverges_leaves_the_others_their_bits(
    slots: AdapterSlots, place: int
) -> None:
    members = members_of(slots)
    sound = Together(slots=slots, settings=settings()).train(members)
    members[place] = replace(members[place], received=partial(with_nan, members[place].received()))
    found = Together(slots=slots, settings=settings()).train(members)
    assert "not finite" in found[place].reason
    assert found[place].adapter == {}
    for n in {0, 1, 2} - {place}:
        assert not found[n].reason
        assert same(found[n], sound[n])


def test_a_group_that_goes_on_after_any_step_has_the_bits_of_one_that_never_stopped(
    slots: AdapterSlots,
) -> None:
    members = members_of(slots)
    expected, states = snapshots(slots, members, settings())
    assert [state.step for state in states[-1]] == [4, 2, 5]
    for found in states[1:]:
        again = Together(slots=slots, settings=settings()).train(
            [replace(m, progress=p) for m, p in zip(members, found, strict=True)]
        )
        assert all(map(same, again, expected))
        assert [r.stats.tokens for r in again] == [r.stats.tokens for r in expected]
        assert all(
            r.stats.step_seconds >= p.stats.step_seconds for r, p in zip(again, found, strict=True)
        )


def test_a_group_of_one_is_a_client_by_itself_to_the_bit(slots: AdapterSlots) -> None:
    member = members_of(slots)[1]
    expected, _ = alone(slots, member, settings())
    (found,), states = snapshots(slots, [member], settings())
    assert same(found, expected)
    assert [[each.step for each in found] for found in states] == [[0], [1]]
    again = replace(member, progress=states[1][0])
    assert same(Together(slots=slots, settings=settings()).train([again])[0], expected)


def test_bits_do_not_depend_on_what_was_trained_before(slots: AdapterSlots) -> None:
    members = members_of(slots)
    first = Together(slots=slots, settings=settings()).train(members)
    other = train_client(
        slots, members[1].received(), members[1].rows, settings=settings(), draws=members[0].draws
    )
    assert math.isfinite(other.stats.losses[-1])
    Together(slots=slots, settings=settings()).train(members[::-1])
    assert all(map(same, Together(slots=slots, settings=settings()).train(members), first))


def test_the_groups_seconds_are_shared_by_computed_tokens(slots: AdapterSlots) -> None:
    members = members_of(slots)
    one, two, three = Together(slots=slots, settings=settings()).train(members)
    assert three.stats.step_seconds > one.stats.step_seconds > two.stats.step_seconds > 0
    for result in (one, two, three):
        assert result.stats.seconds > result.stats.step_seconds
        assert result.stats.peak_memory_bytes > 0


def test_half_precision_passes_keep_the_factors_in_float32(slots: AdapterSlots) -> None:
    members = members_of(slots)
    found = Together(slots=slots, settings=settings(precision="bfloat16")).train(members)
    for result, exact_one in zip(
        found, Together(slots=slots, settings=settings()).train(members), strict=True
    ):
        assert result.stats.losses == pytest.approx(exact_one.stats.losses, rel=0.02)
        assert result.stats.losses != exact_one.stats.losses
        assert all(f.a_RI.dtype == torch.float32 for f in result.adapter.values())


def test_what_the_hook_raises_ends_the_training(slots: AdapterSlots) -> None:
    class Stop(Exception):
        """Enough."""

    def stop_at_2(step: int, _snapshots: object) -> None:
        if step == 2:
            raise Stop

    hook: StepHook = stop_at_2
    with pytest.raises(Stop):
        Together(slots=slots, settings=settings()).train(members_of(slots), before_step=hook)
