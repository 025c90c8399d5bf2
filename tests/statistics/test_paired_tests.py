"""Paired tests against examples that a hand can count, and laws that hold for all."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.statistics.paired_tests import (
    DRAWN_SIGN_FLIPS,
    holm,
    sign_flip_test,
    signed_rank_test,
)

DIFFERENCES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=8)


def test_six_differences_of_one_sign_reach_the_smallest_p_value() -> None:
    test = sign_flip_test([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert test.p == test.smallest == 2 / 64


def test_the_sign_flips_of_three_differences_are_counted_by_hand() -> None:
    # sums of +-1 +-2 +-3: 6, 0, 2, 4 and their negatives; 3 + 2 - 1 = 4 is met by 6, 4, -4, -6
    assert sign_flip_test([-1.0, 2.0, 3.0]).p == 4 / 8


@given(DIFFERENCES)
def test_sign_flips_are_those_of_all_patterns(differences: list[float]) -> None:
    observed = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    far = sum(
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed
        for signs in patterns
    )
    test = sign_flip_test(differences)
    assert test.p == far / len(patterns)
    assert test.p >= test.smallest or len(differences) == 1


def test_many_seeds_are_tested_by_drawn_patterns_that_include_the_observed_one() -> None:
    test = sign_flip_test([1.0] * 40)
    assert test.p == test.smallest == 1 / (DRAWN_SIGN_FLIPS + 1)


def test_the_signed_ranks_of_a_textbook_example() -> None:
    # ranks 1..5, the negative one has rank 1: W- = 1, two patterns of 32 are as small; twice
    assert signed_rank_test([-0.5, 1.0, 2.0, 3.0, 4.0]).p == 4 / 32


def test_ties_share_their_rank_and_zeros_are_left_out() -> None:
    # |d| = 1, 1, 2: ranks 1.5, 1.5, 3; the positive sum 4.5 is reached by 4.5, 4.5, 6: 3 of 8
    test = signed_rank_test([0.0, 1.0, -1.0, 2.0])
    assert (test.p, test.pairs) == (2 * 3 / 8, 3)
    assert signed_rank_test([0.0, 0.0]).p == 1.0


@given(DIFFERENCES)
def test_signed_ranks_are_those_of_all_patterns(differences: list[float]) -> None:
    values = [d for d in differences if d]
    sizes = [abs(d) for d in values]
    ranks = [sum(o < s for o in sizes) + (sum(o == s for o in sizes) + 1) / 2 for s in sizes]
    found = sum(r for r, d in zip(ranks, values, strict=True) if d > 0)
    sums = [
        sum(r for r, plus in zip(ranks, signs, strict=True) if plus)
        for signs in itertools.product((True, False), repeat=len(values))
    ]
    low, high = sum(s <= found for s in sums), sum(s >= found for s in sums)
    assert signed_rank_test(differences).p == min(1.0, 2 * min(low, high) / len(sums))


def test_many_clients_are_close_to_the_exact_distribution() -> None:
    # 50 differences are counted, 51 are taken as normal: nearly the same question
    signs = [1 if n % 3 else -1 for n in range(51)]
    exact = signed_rank_test([s * (n + 1.0) for n, s in enumerate(signs[:50])])
    normal = signed_rank_test([s * (n + 1.0) for n, s in enumerate(signs)])
    assert normal.p == pytest.approx(exact.p, rel=0.35)
    assert math.isclose(signed_rank_test([1.0] * 200).smallest, 2.0**-199)


def test_holm_multiplies_by_the_number_that_is_left_and_never_falls() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {}


@given(st.lists(st.floats(0, 1), max_size=8))
def test_an_adjusted_value_is_at_least_its_own_and_at_most_one(p_values: list[float]) -> None:
    adjusted = holm(dict(enumerate(p_values)))
    assert all(p_values[key] <= value <= 1.0 for key, value in adjusted.items())
