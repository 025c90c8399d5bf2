"""Laws of the server's optimizers: momentum in factors, and a rate for every entry."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.lora.factors import Factors, delta
from fedllm.methods.catalog import METHODS, build_method, method_class
from fedllm.methods.pairs.pair_state import PairMethod
from fedllm.methods.protocol import Method, ModuleState
from fedllm.methods.spectral.spectral_state import SpectralMethod
from tests.lora.adapters import random_factors
from tests.methods.aggregating import aggregate, can_train


def plain(name: str) -> Method:
    return build_method(name, seed=3, alpha=16.0, scaling="fixed")


def plain_task(name: str, round_number: int) -> str:
    return plain(name).local_task(round_number).trained


STAYS = [name for name, entry in METHODS.items() if entry.base == "stays"]
MOVED = [name for name in STAYS if "fedavgm" in method_class(name).server_sides]
PAIRS = [name for name in STAYS if "fedadam" in method_class(name).server_sides]
BOTH_TRAIN = [n for n in PAIRS if {plain_task(n, r) for r in (1, 2)} == {"AB"}]


def method_with(name: str, server: str, **options: float) -> Method:
    return build_method(
        name, seed=3, alpha=16.0, scaling="fixed", server=server, server_options=options
    )


def sent_in(round_number: int, ranks: list[int]) -> list[Factors]:
    return [
        random_factors(100 * round_number + n, out=11, in_=9, rank=rank, scale=16.0 / rank)
        for n, rank in enumerate(ranks)
    ]


def ranks_of(name: str) -> list[int]:
    return [2, 5, 3] if METHODS[name].ranks == "any" else [4, 4, 4]


def rounds(method: Method, ranks: list[int], count: int) -> list[ModuleState]:
    """Return the states of some rounds, round 0 first."""
    shape = sent_in(1, ranks)[0].shape
    states = [method.start_module(module="m", shape=shape, rank=max(ranks))]
    for number in range(1, count + 1):
        found = aggregate(
            method,
            sent_in(number, ranks),
            [1.0, 2.0, 4.0],
            sorted(set(ranks)),
            before=states[-1],
            round_number=number,
        )
        states.append(found.state)
    return states


def product(method: Method, state: ModuleState, rank: int) -> Tensor:
    return delta(method.module_adapter(module="m", state=state, rank=rank))


@pytest.mark.parametrize("name", MOVED)
def test_without_momentum_the_state_is_the_methods_to_the_bit(name: str) -> None:
    ranks = ranks_of(name)
    ours = rounds(method_with(name, "fedavgm", momentum=0.0), ranks, 3)
    theirs = rounds(plain(name), ranks, 3)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[part], other[part]) for part in other)


@pytest.mark.parametrize("name", MOVED)
def test_every_method_carries_momentum_and_its_clients_can_train(name: str) -> None:
    method, ranks = method_with(name, "fedavgm", momentum=0.5, learning_rate=0.7), ranks_of(name)
    states = rounds(method, ranks, 3)
    shape = sent_in(1, ranks)[0].shape
    planned = {part: spec.shape for part, spec in method.parts(shape, max(ranks)).items()}
    for state in states:
        assert {part: tuple(tensor.shape) for part, tensor in state.items()} == planned
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
    for rank in set(ranks):
        can_train(method.module_adapter(module="m", state=states[-1], rank=rank))
    assert not torch.equal(
        product(method, states[-1], max(ranks)),
        product(plain(name), rounds(plain(name), ranks, 3)[-1], max(ranks)),
    )


@settings(max_examples=12, deadline=None)
@given(momentum=st.floats(0, 0.95), rate=st.floats(0.1, 2.0), name=st.sampled_from(BOTH_TRAIN))
def test_momentum_on_factors_is_that_of_torch(momentum: float, rate: float, name: str) -> None:
    ranks = ranks_of(name)
    method = method_with(name, "fedavgm", momentum=momentum, learning_rate=rate)
    states = rounds(method, ranks, 4)
    values = {part: states[0][part].double().requires_grad_() for part in "AB"}
    sgd = {
        part: torch.optim.SGD([value], lr=rate, momentum=momentum) for part, value in values.items()
    }
    for number in range(1, 5):
        before = {part: value.detach().float() for part, value in values.items()}
        sent = sent_in(number, ranks)
        received = sorted(set(ranks))
        new = aggregate(
            plain(name), sent, [1.0, 2.0, 4.0], received, before=before, round_number=number
        ).state
        for part, value in values.items():
            value.grad = value.detach() - new[part].double()
            sgd[part].step()
            torch.testing.assert_close(
                states[number][part].double(), value.detach(), rtol=1e-3, atol=1e-3
            )


def test_momentum_on_triplets_is_that_of_the_product() -> None:
    # 4 rounds of rank 9 updates on 11 x 9: nothing is cut
    momentum, rate, ranks = 0.6, 0.8, [9, 9, 9]
    method = method_with("flexlora", "fedavgm", momentum=momentum, learning_rate=rate)
    states = rounds(method, ranks, 4)
    w = torch.zeros(11, 9, dtype=torch.float64)
    velocity = torch.zeros_like(w)
    for number in range(1, 5):
        weights = [1 / 7, 2 / 7, 4 / 7]
        mean = sum(
            (p * delta(f) for p, f in zip(weights, sent_in(number, ranks), strict=True)),
            torch.zeros_like(w),
        )
        velocity = momentum * velocity + (mean - w)
        w = w + rate * velocity
        torch.testing.assert_close(product(method, states[number], 9), w, rtol=1e-4, atol=1e-4)


def test_what_the_state_has_no_room_for_is_cut_to_the_best_of_its_rank() -> None:
    method = method_with("flexlora", "fedavgm", momentum=0.6, learning_rate=0.8)
    first, second, third = rounds(method, [3, 3, 3], 3)[1:]
    mean = sum(
        (p * delta(f) for p, f in zip([1 / 7, 2 / 7, 4 / 7], sent_in(3, [3, 3, 3]), strict=True)),
        torch.zeros(11, 9, dtype=torch.float64),
    )
    u, s, vh = torch.linalg.svd(mean)
    cut = (u[:, :3] * s[:3]) @ vh[:3]
    x, last = product(method, second, 3), product(method, first, 3)
    u, s, vh = torch.linalg.svd(x + 0.6 * (x - last) + 0.8 * (cut - x))
    best = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close(product(method, third, 3), best, rtol=1e-4, atol=1e-4)


def two_rounds(server: str, **options: float) -> list[Tensor]:
    """Return B of two rounds of two clients of rank 1 that send B = 1 and 3, then 2 and 6."""
    method = method_with("factor_mean", server, **options)
    state = method.start_module(module="m", shape=sent_in(1, [1])[0].shape, rank=1)
    found = []
    for number, values in enumerate(((1.0, 3.0), (2.0, 6.0)), start=1):
        sent = [
            Factors(a_RI=state["A"], b_OR=torch.full((11, 1), value), scale=16.0)
            for value in values
        ]
        state = aggregate(method, sent, [1.0, 1.0], [1], before=state, round_number=number).state
        found.append(state["B"][0, 0].double())
    return found


def test_two_clients_by_hand() -> None:
    # means are 2 and 4. FedAvgM: v = 2, x = 0 + 0.5 x 2 = 1; v = 0.9 x 2 + (4 - 1) = 4.8, x = 3.4
    momentum = two_rounds("fedavgm", momentum=0.9, learning_rate=0.5)
    assert [float(x) for x in momentum] == pytest.approx([1.0, 3.4])
    given: Mapping[str, float] = {"learning_rate": 0.5, "beta1": 0.5, "beta2": 0.5, "tau": 1.0}
    # Adam: m = 1, v = (1 + 4) / 2, x = 0.5 / (2.5 ** 0.5 + 1)
    x = 0.5 * 1.0 / (2.5**0.5 + 1)
    change = 4 - x
    second = (2.5 + change**2) / 2
    adam = [x, x + 0.5 * (0.5 + 0.5 * change) / (second**0.5 + 1)]
    assert [float(b) for b in two_rounds("fedadam", **given)] == pytest.approx(adam)
    # Yogi: v = 1 - 0.5 x 4 x sign(1 - 4) = 3
    x = 0.5 * 1.0 / (3.0**0.5 + 1)
    change = 4 - x
    second = 3.0 + 0.5 * change**2  # change^2 is above 3
    yogi = [x, x + 0.5 * (0.5 + 0.5 * change) / (second**0.5 + 1)]
    assert [float(b) for b in two_rounds("fedyogi", **given)] == pytest.approx(yogi)


def test_a_factor_that_nobody_trained_stays_where_it_is() -> None:
    method = method_with("rolora", "fedavgm", momentum=0.9)
    shape = sent_in(1, [4])[0].shape
    states = [method.start_module(module="m", shape=shape, rank=4)]
    for number in (1, 2, 3):
        before = states[-1]
        trained = method.local_task(number).trained
        changed = {
            "A": before["A"] + (trained == "A") * 0.5,
            "B": before["B"] + (trained == "B") * 0.5,
        }
        sent = [Factors(a_RI=changed["A"], b_OR=changed["B"], scale=4.0)]
        after = aggregate(method, sent, [1.0], [4], before=before, round_number=number).state
        frozen = "A" if trained == "B" else "B"
        torch.testing.assert_close(after[frozen], before[frozen])
        assert torch.equal(after[f"last_{frozen}"], before[f"last_{frozen}"])
        states.append(after)
    # B moved by 0.5 in round 1, rested in round 2, and moves by 0.9 x 0.5 + 0.5 in round 3
    torch.testing.assert_close(states[3]["B"] - states[2]["B"], torch.full((11, 4), 0.95))


@pytest.mark.parametrize("server", ["fedadam", "fedyogi"])
@pytest.mark.parametrize("name", sorted(set(MOVED) - set(PAIRS)))
def test_a_rate_for_every_entry_is_refused_where_the_basis_changes(name: str, server: str) -> None:
    words = rf"^method.server: {server} keeps moments .* directions of {name}'s state change every"
    with pytest.raises(ConfigError, match=words):
        method_with(name, server)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(MOVED)))
def test_momentum_is_refused_where_the_state_is_not_of_factors_alone(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"needs a state of factors alone, which {name} does"):
        method_with(name, "fedavgm")


def test_all_methods_of_a_fixed_form_are_moved() -> None:
    fixed = {n for n in STAYS if issubclass(method_class(n), PairMethod | SpectralMethod)}
    # a B that stays with the clients is none of the server's
    assert {n for n in fixed if not method_class(n).keeps_at_clients} == set(MOVED)
