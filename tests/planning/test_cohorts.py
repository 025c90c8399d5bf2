"""Cohorts: a function of seed, round and ids."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import ConfigError
from fedllm.planning.cohorts import (
    cohort_size,
    draw_cohort,
    quorum_size,
    refuse_empty_cohorts,
)
from tests.planning.federations import config_of

IDS = st.lists(st.text(max_size=5), min_size=1, max_size=40, unique=True)
HALF = config_of(clients__cohort={"fraction": 0.5}).clients


def draw(ids: list[str], seed: int, round_number: int) -> list[str]:
    return draw_cohort(HALF, seed=seed, round_number=round_number, trainable=ids)


@given(ids=IDS, seed=st.integers(), round_number=st.integers(1, 99), order=st.randoms())
def test_the_draw_is_a_function_of_seed_round_and_ids_whatever_their_order(
    ids: list[str], seed: int, round_number: int, order: random.Random
) -> None:
    drawn = draw(ids, seed, round_number)
    shuffled = list(ids)
    order.shuffle(shuffled)
    random.seed(order.random())
    assert draw(shuffled, seed, round_number) == drawn
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(ids)
    assert len(drawn) == cohort_size(HALF, len(ids))


def test_rounds_and_seeds_draw_different_cohorts() -> None:
    ids = [str(n) for n in range(40)]
    assert len({tuple(draw(ids, seed, number)) for seed in (0, 1) for number in (1, 2)}) == 4


def test_every_client_is_drawn_about_equally_often() -> None:
    ids = [str(n) for n in range(10)]
    counts = {id_: sum(id_ in draw(ids, 0, number) for number in range(400)) for id_ in ids}
    assert all(160 <= count <= 240 for count in counts.values())


@pytest.mark.parametrize(
    ("cohort", "trainable", "size"),
    [
        ({"fraction": 0.05}, 1613, 81),
        ({"fraction": 0.05}, 3, 1),
        ({"fraction": 1.0}, 7, 7),
        ({"count": 7}, 7, 7),
        ({"count": 1}, 7, 1),
    ],
)
def test_a_cohort_is_a_count_or_a_fraction_and_at_least_one(
    cohort: dict[str, float], trainable: int, size: int
) -> None:
    assert cohort_size(config_of(clients__cohort=cohort).clients, trainable) == size


def test_a_cohort_above_the_trainable_clients_is_an_error_with_both_numbers() -> None:
    section = config_of(clients__cohort={"count": 8}).clients
    with pytest.raises(ConfigError, match=r"clients.cohort.count: got 8, only 7 clients can train"):
        cohort_size(section, 7)


def test_a_quorum_above_the_cohort_is_an_error_with_both_numbers() -> None:
    section = config_of(clients__cohort={"fraction": 0.3}, clients__quorum=3).clients
    with pytest.raises(ConfigError, match=r"clients.quorum: got 3, a round draws 2 clients"):
        cohort_size(section, 7)


def test_no_trainable_client_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="none can train; lower clients"):
        cohort_size(HALF, 0)


@pytest.mark.parametrize(
    ("quorum", "cohort", "needed"),
    [
        ("all", 10, 10),
        (3, 10, 3),
        (30, 10, 10),
        (1.0, 10, 10),
        (0.5, 10, 5),
        (0.5, 9, 5),
        (0.7, 10, 7),
        (0.01, 10, 1),
    ],
)
def test_a_quorum_is_all_a_count_or_a_share_rounded_up(
    quorum: int | float | str, cohort: int, needed: int
) -> None:
    assert quorum_size(config_of(clients__quorum=quorum).clients.quorum, cohort) == needed


def test_a_poisson_cohort_has_the_expected_size_on_average_and_clients_come_by_themselves() -> None:
    section = config_of(clients__cohort={"count": 30, "sampling": "poisson"}).clients
    ids = [f"c{n}" for n in range(60)]
    drawn = [
        draw_cohort(section, seed=3, round_number=number, trainable=ids) for number in range(400)
    ]
    sizes = [len(cohort) for cohort in drawn]
    assert abs(sum(sizes) / 400 - 30) < 1.0
    variance = sum((size - 30) ** 2 for size in sizes) / 400
    assert 10 < variance < 21  # 60 x 1/2 x 1/2
    both = sum("c1" in cohort and "c2" in cohort for cohort in drawn) / 400
    assert abs(both - 0.25) < 0.08
    assert drawn[7] == draw_cohort(section, seed=3, round_number=7, trainable=ids[::-1])
    assert all(cohort == sorted(cohort) for cohort in drawn)


def test_a_poisson_cohort_that_could_be_empty_is_refused() -> None:
    cohort = {"count": 27, "sampling": "poisson"}
    config = config_of(clients__cohort=cohort)
    with pytest.raises(ConfigError, match=r"sampling: poisson expects 27 clients .* at least 28"):
        refuse_empty_cohorts(config, 27)
    refuse_empty_cohorts(config, 28)
    private = config_of(
        clients__cohort=cohort, privacy__clip_norm=1.0, aggregation__weights="uniform"
    )
    refuse_empty_cohorts(private, 1)
    with pytest.raises(ConfigError, match=r"over_sample: got 0.5, but a Poisson cohort has no"):
        config_of(clients__cohort={"count": 30, "sampling": "poisson"}, clients__over_sample=0.5)
