"""A change of the base's weights: put on for a state of the run, and taken off again.

Legend: O out, I in.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedllm.lora.factors import BaseDelta, formed, on_device, terms_of


@dataclass(frozen=True, kw_only=True)
class BaseChange:
    """A change of the base: `of` returns that of a module's weight (O, I), or None.

    `sha256` identifies it: changes of one digest are the same.
    """

    sha256: str
    of: Callable[[str], BaseDelta | None]


class ChangeableWeights:
    """The weights of some modules of a base, with the change that is on them.

    The weights of the base are kept, not computed back: to take a change off loses no bit.

    Args:
        model: the base.
        transposed: the modules by name; whether each stores its weight as (I, O).
    """

    def __init__(self, model: nn.Module, transposed: "dict[str, bool]") -> None:
        self._model, self._transposed = model, transposed
        self._original: dict[str, Tensor] = {}
        self._sha256: str | None = None

    def put_on(self, change: BaseChange | None) -> None:
        """Let the base have this change, in place of the one that it has; None: no change."""
        if (change.sha256 if change else None) == self._sha256:
            return
        self._take_off(self._original)
        self._sha256 = None
        if change is None:
            self._original = {}
            return
        for module, is_transposed in self._transposed.items():
            added = change.of(module)
            if added is not None:
                self._change(module, added, is_transposed=is_transposed)
        self._sha256 = change.sha256

    def _take_off(self, modules: Iterable[str]) -> None:
        for module in modules:
            self._weight(module).data = self._original[module]

    def _change(self, module: str, added: BaseDelta, *, is_transposed: bool) -> None:
        weight = self._weight(module)
        original = self._original.setdefault(module, weight.data)
        change = formed([on_device(term, original.device) for term in terms_of(added)])
        changed = original.to(torch.float32) + (change.T if is_transposed else change)
        weight.data = changed.to(original.dtype)

    def _weight(self, module: str) -> nn.Parameter:
        layer = self._model.get_submodule(module)
        inner = getattr(layer, "base_layer", layer)
        assert isinstance(inner.weight, nn.Parameter)
        return inner.weight
