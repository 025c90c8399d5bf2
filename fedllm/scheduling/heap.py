"""Settings of the C allocator that every process of fedllm starts with.

glibc cuts the ends off an aligned block and puts them into caches of small blocks, one for each
thread. Small objects then take these ends. A freed tensor stays a few bytes too short for the next
tensor of its size, and the heap grows to twice the memory in use. Without the caches glibc joins
freed blocks again. It reads the variable when a process starts (manual, "Tunables"); other
allocators ignore it.
"""

from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


def with_heap_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the settings added; those it already has come last and win."""
    own = environment.get(VARIABLE)
    return {**environment, VARIABLE: f"{SETTINGS}:{own}" if own else SETTINGS}


def shell_line() -> str:
    """Return the line of a shell script that exports the settings."""
    return f'export {VARIABLE}="{SETTINGS}${{{VARIABLE}:+:${VARIABLE}}}"'
