"""Inputs that nobody meant: samples of good files, cut, repeated and spiced."""

import os
from collections.abc import Sequence

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# of all inputs, how many a family gets; models are slow to load, updates to train again
SHARES = {
    "config": 0.44,
    "records": 0.18,
    "adapters": 0.18,
    "updates": 0.10,
    "data": 0.08,
    "models": 0.02,
}
_SPICES = [
    *(b"-1", b"0", b"1e999", b"-1e-400", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}"),
    *(b'""', b'"', b"'", b"\\", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\t", b": ", b"- "),
    *(
        b"9" * 40,
        b"9" * 5000,
        b"[" * 2000,
        b'{"a":' * 500,
        b"&a [*a]",
        b"<<: *a",
        b"!!python/name:os",
    ),
    *(b'"\\ud800"', b"../../../../etc/passwd", b"a" * 300, b"x" * 70_000, b"\x1b[2J", b"%s%n{0}"),
    *(b"{{ 1/0 }}", b"{% for i in range(10**9) %}x{% endfor %}", b"__class__", b"file:///", b"|"),
]


def profile(family: str) -> settings:
    """Return the settings of a family: its share of FUZZ_N inputs."""
    count = max(1, round(SHARES[family] * int(os.environ.get("FUZZ_N", "100"))))
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=True,
        # to explain takes longer than to find
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


_EDITS = st.tuples(
    st.sampled_from(["cut", "drop", "spice", "repeat", "bytes", "flip"]),
    st.floats(0, 1),
    st.integers(1, 40),
    st.sampled_from(_SPICES) | st.binary(max_size=12),
)


def _edited(data: bytes, kind: str, at: int, length: int, spice: bytes) -> bytes:
    head, part, rest = data[:at], data[at : at + length], data[at + length :]
    edits = {
        "cut": head,
        "drop": head + rest,
        "spice": head + spice + rest,
        "repeat": head + 3 * part + rest,
        "bytes": head + spice + part + rest,
        "flip": head + bytes(byte ^ 0x20 for byte in part) + rest,
    }
    return edits[kind]


@st.composite
def mutated(draw: st.DrawFn, samples: Sequence[bytes]) -> bytes:
    """Draw a sample with some edits."""
    data = draw(st.sampled_from(list(samples)))
    for kind, where, length, spice in draw(st.lists(_EDITS, min_size=1, max_size=3)):
        data = _edited(data, kind, int(where * len(data)), length, spice)
    return data
