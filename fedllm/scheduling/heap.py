"""The settings of C's allocator that the programs' processes start with.

glibc puts the ends that it cuts off an aligned block into caches of small blocks, for every thread.
Small objects then take them, a freed tensor stays a few bytes too short for the next one of its
size, and the heap grows to twice what is in use. Without these caches freed blocks grow together.
glibc reads the variable when a process starts (manual, "Tunables"); other allocators ignore it.
"""

from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


def with_heap_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the settings; those that it has already come last, and win."""
    own = environment.get(VARIABLE)
    return {**environment, VARIABLE: f"{SETTINGS}:{own}" if own else SETTINGS}


def shell_line() -> str:
    """Return the line of a shell script that does the same."""
    return f'export {VARIABLE}="{SETTINGS}${{{VARIABLE}:+:${VARIABLE}}}"'
