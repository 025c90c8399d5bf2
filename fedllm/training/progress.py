"""A client's training between two of its optimizer steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedllm.lora.factors import Adapter
from fedllm.methods.local_task import TrainedFactors
from fedllm.packing.installed import Installed
from fedllm.storage.records import TrainingStats


@dataclass(frozen=True, kw_only=True)
class Progress:
    """All that the rest of a client's training depends on, before step `step` (from 0).

    No generator's state is among it: every step seeds anew. `stats` are of the steps before.

    `tensors` are the factors that train (`<module>|A`, `<module>|B`) and what the optimizer keeps
    for each (`<module>|A|<name>`). In a training they are its own, which the next step changes.
    """

    tensors: Mapping[str, Tensor]
    stats: TrainingStats

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.stats.steps

    def fits(self, adapter: Adapter, trained: TrainedFactors = "AB") -> bool:
        """Say whether its factors are those of `adapter` that train, by modules and shapes."""
        shapes = {name: t.shape for name, t in self.tensors.items() if name.count("|") == 1}
        asked = {f"{module}|A": f.a_RI.shape for module, f in adapter.items()}
        asked |= {f"{module}|B": f.b_OR.shape for module, f in adapter.items()}
        asked |= {f"{module}|C": torch.Size((f.rank, f.rank)) for module, f in adapter.items()}
        return shapes == {name: shape for name, shape in asked.items() if name[-1] in trained}


def tensors_of(installed: Installed, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the factors and the optimizer's state by name, without copying them."""
    return named_tensors(installed, optimizer.state_dict()["state"])


def named_tensors(
    installed: Installed, kept: Mapping[int, Mapping[str, Tensor | None]]
) -> dict[str, Tensor]:
    """Return the trained factors and, by their numbers, what an optimizer keeps, by name."""
    names = installed.parameter_names
    return {
        **{name: p.detach() for name, p in zip(names, installed.parameters, strict=True)},
        **{
            f"{name}|{part}": value
            for number, name in enumerate(names)
            for part, value in kept.get(number, {}).items()
            # SGD without momentum keeps none
            if value is not None
        },
    }


def restore(installed: Installed, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the trained factors and the optimizer's state back as they were."""
    names = installed.parameter_names
    kept = {number: _parts(name, tensors) for number, name in enumerate(names)}
    with torch.no_grad():
        for name, parameter in zip(names, installed.parameters, strict=True):
            parameter.copy_(tensors[name])
    installed.follow_cores()
    groups = optimizer.state_dict()["param_groups"]
    state = {number: parts for number, parts in kept.items() if parts}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _parts(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}|"
    # the optimizer changes its state in place: what was read stays as it is
    return {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
