"""Updates that cannot be true, by what the server knows of their clients."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.storage.paths import RoundPaths
from fedllm.storage.tensors import publish_update
from fedllm.storage.update_problems import Expected, update_problem
from fedllm.storage.updates import read_update
from tests.storage.samples import RANKS, record_of
from tests.storage.updates import SIDES, publish, round_in, tensors_of

EXPECTED = Expected(ranks=RANKS, sides=SIDES, max_rows=7, scales=dict.fromkeys(RANKS, 2.0))
HUGE = 10**400


@pytest.fixture
def paths(tmp_path: Path) -> RoundPaths:
    return round_in(tmp_path)


def problem_of(paths: RoundPaths, expected: Expected = EXPECTED, **changes: Any) -> str | None:
    (update,) = read_update(publish(paths, "a", **changes))
    return update_problem(update, expected)


def test_an_update_as_the_server_expects_it_has_no_problem(paths: RoundPaths) -> None:
    assert problem_of(paths) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 8}, "it trained 8 rows, and the client has 7"),
        ({"rows": HUGE}, "it trained more than 2**53 rows, and the client has 7"),
        ({"tokens": HUGE}, "tokens is more than 2**53, need a number from 0 to 2**53"),
        ({"steps": -1}, "steps is -1, need a number from 0 to 2**53"),
        ({"seconds": -1.0}, "seconds is -1.0, need a finite number >= 0"),
        ({"step_seconds": math.inf}, "step_seconds is inf, need a finite number >= 0"),
        ({"losses": [math.nan]}, "a loss is not finite, and the client did not fail"),
        (
            {"scales": dict.fromkeys(RANKS, 2e6)},
            "layers.0.q_proj has the scale 2000000.0, need 2.0",
        ),
        ({"scales": dict.fromkeys(RANKS, -2.0)}, "layers.0.q_proj has the scale -2.0, need 2.0"),
        (
            {"norms": {"layers.0.q_proj": (1.0, 1.0)}},
            "layers.0.up_proj has no norms of A and B in its record",
        ),
        (
            {"norms": dict.fromkeys(RANKS, (1e20, 1e20))},
            "layers.0.q_proj changes by up to 2e+40, need at most 1e+30",
        ),
        (
            {"norms": dict.fromkeys(RANKS, (1e300, 1e300))},
            "layers.0.q_proj changes by up to inf, need at most 1e+30",
        ),
    ],
)
def test_a_record_that_cannot_be_true_is_named(
    paths: RoundPaths, changes: dict[str, Any], words: str
) -> None:
    assert problem_of(paths, **changes) == words


def test_a_failed_client_cannot_claim_more_rows_either(paths: RoundPaths) -> None:
    path = paths.update(attempt=1, bundle=0, part=0)
    publish_update(path, [record_of("a", status="failed", reason="diverged", rows=HUGE)], {})
    (update,) = read_update(path)
    assert update_problem(update, EXPECTED) == (
        "it trained more than 2**53 rows, and the client has 7"
    )


def test_a_method_of_a_users_own_decides_its_scales(paths: RoundPaths) -> None:
    own = replace(EXPECTED, scales=None)
    assert problem_of(paths, own, scales=dict.fromkeys(RANKS, 3.0)) is None


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({**RANKS, "layers.0.q_proj": 3}, "layers.0.q_proj A has shape (2, 6), need (3, 6)"),
        ({"layers.0.q_proj": 2}, "layers.0.up_proj A is unexpected"),
    ],
)
def test_wrong_shapes_are_named(paths: RoundPaths, ranks: dict[str, int], words: str) -> None:
    assert problem_of(paths, replace(EXPECTED, ranks=ranks)) == words


def test_a_missing_module_is_named(paths: RoundPaths) -> None:
    path = paths.update(attempt=1, bundle=0, part=0)
    publish_update(path, [record_of("a")], {"a": tensors_of("a", {"layers.0.q_proj": 2})})
    (update,) = read_update(path)
    assert update_problem(update, EXPECTED) == "layers.0.up_proj A has shape None, need (3, 4)"


def test_a_factor_that_was_not_to_be_sent_is_named(paths: RoundPaths) -> None:
    one = replace(EXPECTED, sent="B")
    assert problem_of(paths, one) == "layers.0.q_proj A is unexpected"
    path = paths.update(attempt=1, bundle=1, part=0)
    publish_update(path, [record_of("a")], {"a": tensors_of("a", RANKS)}, "B")
    (update,) = read_update(path)
    assert update_problem(update, one) is None
    assert update_problem(update, EXPECTED) == "layers.0.q_proj A has shape None, need (2, 6)"
