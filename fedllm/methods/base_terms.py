"""Terms of a change of the base: parts of a state that the states of later rounds take over.

A part named `base/<k>/<what>` is one. It is written once, with the state of its round; later states
refer to that file. `W` (O, I) is a matrix, `B` (O, K) and `A` (K, I) are two factors. The change is
the sum of the newest matrix, which has in it all terms before it, and of the products after it.
"""

from collections.abc import Iterable

_PREFIX = "base/"


def term_name(number: int, what: str) -> str:
    """Return the name of a part of the term with this number."""
    return f"{_PREFIX}{number}/{what}"


def is_term(part: str) -> bool:
    """Return whether a part of a state is one of a term."""
    return part.startswith(_PREFIX)


def live_terms(parts: Iterable[str]) -> list[str]:
    """Return the parts, of all these, of the terms that still count: in their order of numbers."""
    terms = sorted((_number(part), part) for part in parts if is_term(part))
    begin = max((number for number, part in terms if part.endswith("/W")), default=0)
    return [part for number, part in terms if number >= begin]


def next_number(parts: Iterable[str]) -> int:
    """Return the number of the next term of a state with these parts."""
    return 1 + max((_number(part) for part in parts if is_term(part)), default=0)


def _number(part: str) -> int:
    return int(part.removeprefix(_PREFIX).partition("/")[0])
