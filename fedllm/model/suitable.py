"""Objections to a base, or to its configured targets, by measuring and counting."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from fedllm.config.models import LoraSection
from fedllm.config.target_modules import Targets
from fedllm.errors import ModelError
from fedllm.model.reach import Reach, measure_reach
from fedllm.model.targets import adaptable_modules, find_modules, kind_of, names_for, path_pattern
from fedllm.storage.records import ModuleRecord

Say = Callable[[str], None]

_NAMED = 2  # path patterns that a line names; it counts the others
_NOT_FUSED = (nn.Linear, nn.Embedding, Conv1D, _ConvNd)


@dataclass(frozen=True, kw_only=True)
class _Objection:
    """An objection: a line for the user; if `refused`, an error in a run that has not begun."""

    line: str
    refused: bool = True


def suitable_modules(
    model: nn.Module, config: Any, targets: Targets, *, say: Say, begun: bool = False
) -> dict[str, ModuleRecord]:
    """Return the modules that get an adapter, if there is no objection.

    Args:
        model: the base; its weights are not read.
        config: the base's configuration, as transformers reads it.
        targets: `lora.target_modules`.
        say: called with each line that the user should know and that is no error.
        begun: a run has trained so before: all objections are said, none is raised.

    Raises:
        ModelError: tokens see later ones; a target does not exist; adapters would stay zero; or
            the default targets leave out the routed experts.
    """
    reach = measure_reach(config)
    experts = _fused_experts(model)
    _raise_or_say(_base_objections(model, reach), say, begun=begun)
    try:
        modules = find_modules(model, targets, unreached=reach.unreached)
    except ModelError as error:
        left_out = f"; {_left_out(experts)}" if experts else ""
        raise ModelError(f"{error}{left_out}") from error
    _raise_or_say(_unreached_objections(model, targets, modules, reach), say, begun=begun)
    if experts:
        _raise_or_say(_expert_objections(model, targets, modules, reach, experts), say, begun=begun)
    return modules


def _raise_or_say(objections: Iterator[_Objection], say: Say, *, begun: bool) -> None:
    for objection in objections:
        if objection.refused and not begun:
            raise ModelError(objection.line)
        say(objection.line)


def _base_objections(model: nn.Module, reach: Reach) -> Iterator[_Objection]:
    name = type(model).__name__
    if reach.unknown:
        yield _Objection(
            line=f"model.path: not measured whether tokens of {name} see later ones, and which "
            f"modules text reaches: {reach.unknown}",
            refused=False,
        )
    if reach.looks_ahead:
        yield _Objection(
            line=f"model.path: tokens of {name} see later ones, so that its loss says nothing "
            f"(measured: logits of earlier tokens moved by {reach.looks_ahead:.1%} when later "
            "tokens changed); need a causal language model"
        )


def _unreached_objections(
    model: nn.Module, targets: Targets, modules: Mapping[str, ModuleRecord], reach: Reach
) -> Iterator[_Objection]:
    zero = [path for path in modules if path_pattern(path) in reach.unreached]
    if not zero:
        return
    in_full = set() if isinstance(targets, str) else set(targets)
    trainable = [path for path in modules if path not in zero]
    value = names_for(trainable, adaptable_modules(model)) if trainable else ""
    others = f", as lora.target_modules: {value}" if value else ""
    yield _Objection(
        line=f"lora.target_modules: adapters of {_shown(zero)} would stay zero, since no text "
        f"goes through these modules ({len(zero)} of {len(modules)}); name others only{others}",
        refused=not in_full.issuperset(zero),
    )


def _expert_objections(
    model: nn.Module,
    targets: Targets,
    modules: Mapping[str, ModuleRecord],
    reach: Reach,
    experts: Mapping[str, int],
) -> Iterator[_Objection]:
    sizes = {
        path: m.out_features * m.in_features
        for path, m in adaptable_modules(model).items()
        if m.kind == "mlp" and path_pattern(path) not in reach.unreached
    }
    covered = sum(size for path, size in sizes.items() if path in modules)
    share = covered / (sum(sizes.values()) + sum(experts.values()))
    coverage = f"adapters cover {share:.0%} of the MLP parameters: {_left_out(experts)}"
    if targets != LoraSection().target_modules:
        yield _Objection(line=f"lora.target_modules: {coverage}", refused=False)
        return
    value = names_for(list(modules), adaptable_modules(model), parents=1)
    yield _Objection(
        line=f"lora.target_modules: with the default names {coverage}; to train so, name what you "
        f"mean{f', as lora.target_modules: {value}' if value else ''}"
    )


def _left_out(experts: Mapping[str, int]) -> str:
    return f"the routed experts ({_shown(list(experts))}) are fused parameters, which get none"


def _fused_experts(model: nn.Module) -> dict[str, int]:
    """Return the parameters that hold all experts of a layer, with their sizes."""
    return {
        f"{owner}.{name}": parameter.numel()
        for owner, module in model.named_modules()
        if not isinstance(module, _NOT_FUSED)
        for name, parameter in module.named_parameters(recurse=False)
        if _holds_experts(f"{owner}.{name}", parameter.ndim)
    }


def _holds_experts(path: str, dimensions: int) -> bool:
    named_so = "expert" in path and dimensions > 1
    return named_so or (dimensions > 2 and kind_of(path) == "mlp")


def _shown(paths: Sequence[str]) -> str:
    patterns = list(dict.fromkeys(map(path_pattern, paths)))
    more = f" and {len(patterns) - _NAMED} more kinds" if len(patterns) > _NAMED else ""
    return ", ".join(patterns[:_NAMED]) + more
