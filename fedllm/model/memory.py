"""Freed memory of a process, returned to the system."""

import ctypes
from collections.abc import Callable
from functools import cache

import pyarrow as pa

# of mallopt, see malloc.h
_MMAP_THRESHOLD = -3


def give_back_large_blocks(num_bytes: int) -> None:
    """Let C's allocator return every freed block of at least `num_bytes` at once, where it can.

    Without this call glibc keeps ever larger blocks (up to 32 MiB) in the heap, whose gaps then
    take as much memory as the weights that come and go.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        change(_MMAP_THRESHOLD, num_bytes)


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
