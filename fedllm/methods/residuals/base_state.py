"""The part of a state that is a change of the base: `D` (O, I), float32, of one module."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.lora.factors import ModuleShape
from fedllm.methods.protocol import ModuleState, StatePart

CHANGE = "D"


def change_part(shape: ModuleShape) -> Mapping[str, StatePart]:
    """Return the name and shape of the change of the base."""
    return {CHANGE: StatePart(shape=(shape.out, shape.in_))}


def no_change(shape: ModuleShape) -> ModuleState:
    """Return the change of round 0: zero."""
    return {CHANGE: torch.zeros(shape.out, shape.in_)}


def changed(before: ModuleState, added_OI: Tensor) -> Mapping[str, Tensor]:
    """Return the change of the base with `added_OI` in addition."""
    return {CHANGE: before[CHANGE] + added_OI.to(before[CHANGE])}
