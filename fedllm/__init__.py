"""Federated LoRA fine-tuning across clients of different ranks, as batch jobs.

From Python:

- `load_run(path)`: a run directory as pandas data frames (`LoadedRun`)
- `load_sweep(path)`: the runs of a sweep, likewise (`LoadedSweep`)
- `run(config)`: run a configuration to its end, as `fedllm run` does
- `aggregate(adapters, rank=...)`: combine PEFT adapters of any ranks (`CombinedAdapter`)
- `Method`: the class of a federated method, to write one's own

Names are imported when they are first used: `import fedllm` alone loads none of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedllm.api.combining import CombinedAdapter, aggregate
    from fedllm.api.loaded_run import LoadedRun, load_run
    from fedllm.api.loaded_sweep import LoadedSweep, load_sweep
    from fedllm.api.running import run
    from fedllm.methods.protocol import Method

__all__ = [
    "CombinedAdapter",
    "LoadedRun",
    "LoadedSweep",
    "Method",
    "aggregate",
    "load_run",
    "load_sweep",
    "run",
]

_HOMES = {
    "CombinedAdapter": "fedllm.api.combining",
    "LoadedRun": "fedllm.api.loaded_run",
    "LoadedSweep": "fedllm.api.loaded_sweep",
    "Method": "fedllm.methods.protocol",
    "aggregate": "fedllm.api.combining",
    "load_run": "fedllm.api.loaded_run",
    "load_sweep": "fedllm.api.loaded_sweep",
    "run": "fedllm.api.running",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
