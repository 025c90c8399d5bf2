"""Memory that a process no longer needs, given back to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back_freed() -> None:
    """Give back what was freed, which C's allocator keeps; nothing where it cannot be told to."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    # glibc alone has it
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
