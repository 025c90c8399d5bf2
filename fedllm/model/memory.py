"""Memory that a process no longer needs, given back to the system."""

import ctypes
from collections.abc import Callable
from functools import cache

import pyarrow as pa


def give_back_freed() -> None:
    """Give back freed memory that Arrow's and C's allocators keep, as far as they can be told."""
    pa.default_memory_pool().release_unused()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    # glibc alone has it
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
