"""The adapter that a model computes with: its tensors, and which of them train."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedllm.lora.factors import Adapter, Factors
from fedllm.methods.local_task import TrainedFactors


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The adapter that the model computes with, until the next `install`.

    `trained` are the factors that train. `frozen` is added to them in the passes of a group. Where
    `cores` train, B is `received_b` times the core.
    """

    modules: tuple[str, ...]
    scales: Mapping[str, float]
    a: tuple[nn.Parameter, ...]
    b: tuple[nn.Parameter, ...]
    trained: TrainedFactors = "AB"
    frozen: "Installed | None" = None
    cores: tuple[nn.Parameter, ...] = ()
    received_b: tuple[Tensor, ...] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters in the order of `modules`: every A, then every B; or the cores."""
        return [parameter for own in self._factors(self.trained) for parameter in own]

    @property
    def parameter_names(self) -> list[str]:
        """The names of the trained parameters: `<module>|A`, then `<module>|B`."""
        return [f"{module}|{factor}" for factor in self.trained for module in self.modules]

    def begin(self) -> None:
        """Let the trained parameters take gradients, from none on, and no other one."""
        for parameter in (*self.a, *self.b):
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in (*self.parameters, *(self.b if self.cores else ())):
            parameter.requires_grad_(True)

    def with_cores(self) -> "Installed":
        """Return the same with a core for every module, the identity, if cores train."""
        if self.trained != "C":
            return self
        eyes = (torch.eye(b.shape[1], device=b.device, dtype=b.dtype) for b in self.b)
        return replace(
            self,
            cores=tuple(nn.Parameter(eye) for eye in eyes),
            received_b=tuple(b.detach().clone() for b in self.b),
        )

    def take_gradients(self) -> None:
        """Give the cores, if they train, the gradients that B has."""
        for core, received, b in zip(self.cores, self.received_b, self.b, strict=False):
            assert b.grad is not None, "B has no gradient"
            core.grad, b.grad = received.T @ b.grad, None

    def follow_cores(self) -> None:
        """Let B be what the cores, if they train, make of it."""
        with torch.no_grad():
            for core, received, b in zip(self.cores, self.received_b, self.b, strict=False):
                b.copy_(received @ core)

    def _factors(self, names: str) -> list[tuple[nn.Parameter, ...]]:
        return [{"A": self.a, "B": self.b, "C": self.cores}[name] for name in names]

    def factors(self) -> Adapter:
        """Return copies of the factors, float32 on the CPU."""
        return {
            module: Factors(a_RI=_on_cpu(a), b_OR=_on_cpu(b), scale=self.scales[module])
            for module, a, b in zip(self.modules, self.a, self.b, strict=True)
        }


def _on_cpu(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32, copy=True)
