"""What seeds draw; the runs themselves are `make chaos`."""

from collections import Counter

import pytest

from tests.chaos.plan import FEWEST_FAULTS, MODES, ROUNDS, Kind, draw


@pytest.mark.parametrize("seed", range(50))
def test_every_seed_brings_every_kind_of_fault_into_every_round(seed: int) -> None:
    plan = draw(seed)
    assert {fault.kind for fault in plan.faults} == set(Kind)
    assert len(plan.faults) >= FEWEST_FAULTS
    rounds = Counter(fault.round for fault in plan.faults)
    assert len(rounds) == ROUNDS >= 4
    assert max(rounds.values()) - min(rounds.values()) <= 1
    assert {leg.mode for leg in plan.legs} == set(MODES)
    assert plan.rounds == ROUNDS
    half = plan.first(3)
    assert half.rounds == 3
    assert len(half.faults) == sum(fault.round <= 3 for fault in plan.faults) >= 12


def test_a_seed_draws_the_same_faults_again_and_another_one_others() -> None:
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
