"""Seeds depend only on their identity."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from fedllm.planning.seeding import seed_of

IDENTITIES = st.lists(st.integers() | st.text(), max_size=4)


@given(one=IDENTITIES, other=IDENTITIES)
def test_different_identities_have_different_seeds(
    one: list[int | str], other: list[int | str]
) -> None:
    assert (seed_of(*one) == seed_of(*other)) == (one == other)
    assert 0 <= seed_of(*one) < 2**63


def test_parts_are_kept_apart() -> None:
    identities = [("a", "b"), ("ab",), ("a\x1fstr:b",), ("a;str:1:b",), (1,), ("1",), (1, 1), (11,)]
    assert len({seed_of(*identity) for identity in identities}) == len(identities)


def test_every_process_and_machine_gives_the_same_seed() -> None:
    script = "from fedllm.planning.seeding import seed_of; print(seed_of('cohort', 3, 'ü'))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == seed_of("cohort", 3, "ü") == 3587556762203589453
