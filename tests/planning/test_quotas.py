"""Laws of splitting a whole number by shares."""

from hypothesis import given
from hypothesis import strategies as st

from fedllm.planning.quotas import largest_remainder

SHARES = st.dictionaries(
    st.text(max_size=4),
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 100).map(float)),
    min_size=1,
    max_size=12,
).filter(lambda shares: sum(shares.values()) > 0)


@given(shares=SHARES, total=st.integers(0, 5000))
def test_quotas_sum_exactly_and_are_within_one_of_the_ideal(
    shares: dict[str, float], total: int
) -> None:
    counts = largest_remainder(shares, total)
    assert list(counts) == list(shares)
    assert sum(counts.values()) == total
    whole = sum(shares.values())
    for key, count in counts.items():
        assert abs(count - total * shares[key] / whole) < 1 + 1e-6


@given(shares=SHARES, total=st.integers(0, 500))
def test_a_share_of_zero_gets_nothing(shares: dict[str, float], total: int) -> None:
    counts = largest_remainder(shares, total)
    assert all(counts[key] == 0 for key, share in shares.items() if share == 0)


@given(shares=SHARES, total=st.integers(0, 500), factor=st.sampled_from([2.0, 0.5, 1024.0]))
def test_only_the_proportions_of_shares_count(
    shares: dict[str, float], total: int, factor: float
) -> None:
    scaled = {key: factor * share for key, share in shares.items()}
    assert largest_remainder(scaled, total) == largest_remainder(shares, total)


@given(count=st.integers(1, 9), total=st.integers(0, 100))
def test_ties_go_to_the_earlier_key(count: int, total: int) -> None:
    counts = list(largest_remainder(dict.fromkeys(map(str, range(count)), 0.1), total).values())
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
