"""Freed memory of a process, returned to the system."""

import ctypes
from collections.abc import Callable
from functools import cache

import pyarrow as pa


def give_back_freed() -> None:
    """Return freed memory of the allocators of Arrow and C to the system, where they can."""
    pa.default_memory_pool().release_unused()
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    # only glibc has it
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
