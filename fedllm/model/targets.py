"""The target modules of a base: those that `lora.target_modules` names or could name."""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedllm.config.target_modules import Targets, is_target
from fedllm.errors import ModelError
from fedllm.storage.records import ModuleRecord

Kind = Literal["attention", "mlp", "other"]
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|\bfc\d|dense_(h_to|4h_to)|(gate|up|down)_proj")
_ATTENTION_LEAVES = re.compile(r"\b(([qkvo]|qkv|out)_proj|query|key|value|query_key_value|W?qkv)$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_MAX_NAMES = 16


def find_modules(
    model: nn.Module, target_modules: Targets, *, unreached: Set[str] = frozenset()
) -> dict[str, ModuleRecord]:
    """Return the modules that `target_modules` names, in the order of the model.

    Args:
        model: the base.
        target_modules: paths or their last parts, or a regular expression for whole paths.
        unreached: path patterns of modules that a message does not offer.

    Raises:
        ModelError: a name matches no module, or a module that cannot be adapted.
    """
    adaptable = adaptable_modules(model)
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        named: Targets = target if isinstance(target_modules, str) else (target,)
        if not any(is_target(named, path) for path in adaptable):
            offered = [path for path in adaptable if path_pattern(path) not in unreached]
            raise ModelError(_no_module(model, target, named, offered))
    return {path: m for path, m in adaptable.items() if is_target(target_modules, path)}


def adaptable_modules(model: nn.Module) -> dict[str, ModuleRecord]:
    """Return all modules that can have an adapter: the linear ones, without the output head."""
    causal: Any = model
    head = causal.get_output_embeddings()
    return {
        path: _record(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def path_pattern(path: str) -> str:
    """Return a path with `*` for its numbers: the same module of all layers has one pattern."""
    return _NUMBER.sub("*", path)


def kind_of(path: str) -> Kind:
    """Return the kind of a module by its path; parent names count before the last part."""
    parents, _, leaf = path.rpartition(".")
    if _ATTENTION.search(parents):
        return "attention"
    if _MLP.search(path):
        return "mlp"
    return "attention" if _ATTENTION.search(leaf) or _ATTENTION_LEAVES.search(leaf) else "other"


def names_for(modules: Sequence[str], paths: Iterable[str], *, parents: int = 0) -> str:
    """Return a value of `lora.target_modules` that names these modules and no others.

    Args:
        modules: paths of the modules to name.
        paths: paths of all modules that could be named.
        parents: min number of parts of a path before its last one.

    Returns:
        The value as YAML, short if possible; empty if only a long list would do.
    """
    all_paths = set(paths)
    tails = list(dict.fromkeys(_last_parts(path, parents + 1) for path in modules))
    if _named(all_paths, tails) == set(modules):
        return f"[{', '.join(tails)}]"
    for depth in range(parents + 2, parents + 4):
        longer = list(dict.fromkeys(_last_parts(path, depth) for path in modules))
        if len(longer) <= _MAX_NAMES and _named(all_paths, longer) == set(modules):
            return f"[{', '.join(longer)}]"
    return _pattern_for(modules, all_paths, tails)


def _pattern_for(modules: Sequence[str], all_paths: Set[str], tails: Sequence[str]) -> str:
    """Return a regular expression for paths with a common part that no other path has."""
    shared = set.intersection(*(set(path.split(".")) for path in modules)) if modules else set()
    for part in sorted(shared, key=lambda part: modules[0].split(".").index(part)):
        pattern = rf".*{part}\..*\.({'|'.join(tails)})"
        if _named(all_paths, pattern) == set(modules):
            return pattern
    return ""


def _named(paths: Set[str], targets: Targets) -> set[str]:
    return {path for path in paths if is_target(targets, path)}


def _last_parts(path: str, count: int) -> str:
    return ".".join(path.split(".")[-count:])


def _record(path: str, module: nn.Linear | Conv1D) -> ModuleRecord:
    transposed = isinstance(module, Conv1D)
    # a quantised linear layer has another shape of weight
    size = module.weight.shape if transposed else (module.in_features, module.out_features)
    return ModuleRecord(
        out_features=size[1], in_features=size[0], kind=kind_of(path), transposed=transposed
    )


def _no_module(model: nn.Module, target: str, named: Targets, offered: Sequence[str]) -> str:
    name = type(model).__name__
    for path, module in model.named_modules():
        if path and is_target(named, path):
            return (
                f"lora.target_modules: `{target}` of {name} is a {type(module).__name__}, only "
                "Linear and Conv1D modules can be adapted, but for the output head; "
                f"{_offer(offered)}"
            )
    leaves = ", ".join(_leaves(offered)) or "none"
    return (
        f"lora.target_modules: {name} has no module `{target}`; it has {leaves}: {_offer(offered)}"
    )


def _offer(offered: Sequence[str]) -> str:
    return f"name those that you mean, as lora.target_modules: [{', '.join(_leaves(offered))}]"


def _leaves(paths: Sequence[str]) -> Mapping[str, None]:
    return dict.fromkeys(path.rpartition(".")[2] for path in paths)
