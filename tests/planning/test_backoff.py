"""Backoff: a pause doubles up to its limit and is reset by a success."""

from fedllm.planning.backoff import Backoff


def test_a_pause_doubles_up_to_its_limit_and_is_reset() -> None:
    pause = Backoff(3.0, max_seconds=20.0)
    found = []
    for _ in range(5):
        found.append(pause.seconds)
        pause.fail()
    assert found == [3.0, 6.0, 12.0, 20.0, 20.0]
    pause.succeed()
    assert pause.seconds == 3.0


def test_failures_without_end_overflow_nothing() -> None:
    pause = Backoff(1e-3, max_seconds=1e300)
    pause.failures = 10**6
    assert pause.seconds < 1e300


def test_a_first_pause_beyond_the_limit_is_cut() -> None:
    assert Backoff(100.0, max_seconds=10.0).seconds == 10.0
