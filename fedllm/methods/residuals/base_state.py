"""The part of a state that is a change of the base: `D` (O, I), float32, of one module."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.lora.factors import ModuleShape
from fedllm.methods.protocol import Method, ModuleState, StatePart

CHANGE = "D"


class ChangesBase(Method):
    """A method whose state also has a change of the base; named before the class it extends."""

    changes_base: ClassVar[bool] = True

    def parts(self, shape: ModuleShape, rank: int) -> Mapping[str, StatePart]:
        """Return the parts of the extended class and the change of the base."""
        others = super().parts(shape, rank)  # type: ignore[safe-super]  # of the extended class
        return {**others, CHANGE: StatePart(shape=(shape.out, shape.in_))}

    def start_module(self, *, module: str, shape: ModuleShape, rank: int) -> ModuleState:
        """Return the start of the extended class, and no change of the base."""
        start = super().start_module(module=module, shape=shape, rank=rank)  # type: ignore[safe-super]
        return {**start, CHANGE: torch.zeros(shape.out, shape.in_)}

    def base_delta(self, state: ModuleState) -> Tensor | None:
        """Return the change that all rounds made."""
        return state[CHANGE]


def changed(before: ModuleState, added_OI: Tensor) -> Mapping[str, Tensor]:
    """Return the change of the base with `added_OI` in addition."""
    return {CHANGE: before[CHANGE] + added_OI.to(before[CHANGE])}
