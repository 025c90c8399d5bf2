"""Reach in a base, measured: whether tokens see later ones, and which modules text reaches.

A configuration does not tell: a class may ignore that it is a decoder, or may use a module's weight
without calling the module, so that an adapter there has no effect. So a model of the same class and
configuration, with random weights, computes a few tokens.

Legend: N rows, T tokens, V vocabulary.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedllm.model.small import silence, small_model, whole_model
from fedllm.model.targets import adaptable_modules, path_pattern
from fedllm.storage.hub import first_line

_TOKENS = 48
_CHANGES = (1, 7, 22, 37, 47)  # places from which on a copy of the row has other tokens
# max relative change of logits that must not move; causal models give the same bits
_TOLERANCE = 1e-6
_RESERVED = re.compile(r"_token_(id|index)$|^(image|video|audio|boi|eoi)_\w*(id|index)$")


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The reach of a base's class and configuration, as measured.

    Attributes:
        looks_ahead: relative change of the logits of a token when later tokens change.
        unreached: path patterns of modules whose output no logit of a text depends on.
        unknown: why nothing was measured; empty if it was.
    """

    looks_ahead: float = 0.0
    unreached: frozenset[str] = frozenset()
    unknown: str = ""


def measure_reach(config: Any) -> Reach:
    """Measure the reach of a base by its configuration, as transformers reads it."""
    try:
        with silence():
            return _measured(small_model(config, cutoff_tokens=0), config)
    # a class that cannot be made small may raise anything
    except Exception:
        pass
    try:
        with silence():
            return _measured(whole_model(config), config)
    except Exception as error:
        return Reach(unknown=f"no small {type(config).__name__} computes ({first_line(error)})")


def _measured(model: nn.Module, config: Any) -> Reach:
    tokens_NT = _rows(model, config)
    with torch.no_grad():
        logits_NTV = _logits(model, tokens_NT)
    moved = [
        ((changed[:first] - logits_NTV[0, :first]).norm() / logits_NTV[0, :first].norm()).item()
        for changed, first in zip(logits_NTV[1:], _CHANGES, strict=True)
    ]
    if not all(number == number for number in moved):
        raise ValueError("its logits are not finite")
    return Reach(
        looks_ahead=max(moved) if max(moved) > _TOLERANCE else 0.0,
        unreached=_unreached(model, tokens_NT[:1]),
    )


def _unreached(model: nn.Module, tokens_NT: Tensor) -> frozenset[str]:
    """Return the path patterns of which no module is called and gets a gradient."""
    # per pattern: an expert may get no token, and a layer of many may be skipped
    reached: dict[str, bool] = {}
    model.zero_grad()
    with _calls(model) as called, torch.enable_grad():
        logits_NTV = _logits(model, tokens_NT)
        functional.cross_entropy(logits_NTV[0, :-1], tokens_NT[0, 1:]).backward()  # type: ignore[no-untyped-call]
    for path in adaptable_modules(model):
        gradient = model.get_submodule(path).get_parameter("weight").grad
        used = path in called and gradient is not None and bool(gradient.any())
        reached[path_pattern(path)] = reached.get(path_pattern(path), False) or used
    return frozenset(pattern for pattern, used in reached.items() if not used)


@contextmanager
def _calls(model: nn.Module) -> Iterator[set[str]]:
    """Collect the paths of all modules that are called in the block."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, _output, path=path: called.add(path))
        for path, module in model.named_modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _logits(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
    return logits.double()


def _rows(model: nn.Module, config: Any) -> Tensor:
    """Return a row of ordinary tokens, and copies that differ from a place of `_CHANGES` on."""
    causal: Any = model
    size = causal.get_input_embeddings().num_embeddings
    ordinary = sorted(set(range(size)) - _reserved(config) - _reserved(model.config))
    draw = random.Random(0)
    row = draw.choices(ordinary, k=_TOKENS)
    # each token differs from that of the row
    others = [draw.choice([t for t in ordinary[:64] if t != token]) for token in row]
    return torch.tensor([row, *([*row[:n], *others[n:]] for n in _CHANGES)])


def _reserved(config: Any) -> set[int]:
    """Return the tokens that stand for something other than text."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    reserved: set[int] = set()
    for part in filter(None, parts):
        for name, value in vars(part).items():
            if _RESERVED.search(name):
                reserved |= {v for v in (value if isinstance(value, list) else [value]) if v}
    return reserved
