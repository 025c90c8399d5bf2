"""Tensor names of adapters: the module of the base that a tensor belongs to.

A name is `base_model.model.<module>.lora_A.weight`. torch.compile, FSDP, DDP and activation
checkpointing add names of wrappers around the model or its parts. A state dictionary that PEFT did
not write also has the adapter's name. In transformers 4.52 and 5 the modules of vision-language
models got other names, which PEFT and transformers take as the same
(`transformers.conversion_mapping`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# parts of a name that are no module of the base
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
_OUTERMOST = "module"  # of DDP and DeepSpeed, around a whole model
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>[^.]+))?\.weight")
# parts that only say where the language model is in the whole model, in any order
_STRUCTURE = frozenset({"model", "language_model", "llm", "thinker"})
_WITHIN_TOWER = "vision_model"  # between a tower and its layers, until transformers 5
_RENAMED = {"embed_out": "lm_head"}  # of GPT-NeoX, until transformers 5
_COPIED = ("embed_tokens", "lm_head")  # as PEFT knows embedding layers by name
_LITERAL = re.compile(r"\^?(?P<name>[\w.\\-]+?)\$?")


@dataclass(frozen=True, kw_only=True)
class FactorKey:
    """The factor that a tensor's name means: A or B (`part`) of a module."""

    module: str
    part: str


def factor_key(tensor: str) -> FactorKey | None:
    """Return the factor and module of a tensor's name; None if it is no factor."""
    name = _unwrapped(tensor)
    if not name.startswith(_PREFIX):
        return None
    match = _FACTOR.fullmatch(_unwrapped(name.removeprefix(_PREFIX)))
    return FactorKey(module=match["module"], part=match["part"]) if match else None


def base_key(tensor: str) -> str | None:
    """Return the weight or bias of the base that an adapter's tensor copies; None if none.

    PEFT saves those of `lm_head` and of the embedding if they are targets.
    """
    name = _unwrapped(tensor)
    if not name.startswith(_PREFIX):
        return None
    name = _unwrapped(name.removeprefix(_PREFIX)).replace(".base_layer.", ".")
    owner, _, kind = name.rpartition(".")
    is_copy = kind in ("weight", "bias") and owner.rpartition(".")[2] in _COPIED
    return name if is_copy else None


def place_of(module: str) -> str:
    """Return the place of a module: the same for all names that it has had.

    Two modules of one model have different places.
    """
    parts = [part for part in _unwrapped(module).split(".") if part not in _STRUCTURE]
    kept = [part for at, part in enumerate(parts) if not (at and part == _WITHIN_TOWER)]
    if len(kept) == 1:
        kept = [_RENAMED.get(kept[0], kept[0])]
    return ".".join(kept) or module


def same_place(pattern: str, module: str) -> bool:
    """Say whether a pattern of a configuration is a name of the module, now or earlier."""
    literal = _LITERAL.fullmatch(pattern)
    return literal is not None and place_of(literal["name"].replace("\\", "")) == place_of(module)


def common_names(names: Sequence[Iterable[str]]) -> dict[str, str]:
    """Return the common name of each module of several adapters: every name -> common name.

    If adapters have different names for a module, that of the newest transformers is taken.
    """
    called: dict[str, list[str]] = {}
    for module in dict.fromkeys(name for adapter in names for name in adapter):
        called.setdefault(place_of(module), []).append(module)
    chosen = {place: max(modules, key=_newness) for place, modules in called.items()}
    moved = dict(
        _moved(module, chosen[place])
        for place, modules in called.items()
        for module in modules
        if module != chosen[place]
    )
    return {
        module: _relocated(chosen[place], moved)
        for place, modules in called.items()
        for module in modules
    }


def names_in(modules: Iterable[str], base: Iterable[str]) -> dict[str, str]:
    """Return the base's name of each module; modules that the base does not have are left out."""
    known = list(base)
    places = {place_of(name): name for name in known}
    own = set(known)
    own_names = {
        module: module if module in own else places.get(place_of(module)) for module in modules
    }
    return {module: name for module, name in own_names.items() if name is not None}


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _OUTERMOST:
        parts = parts[1:]
    return ".".join(parts)


def _newness(name: str) -> tuple[bool, bool, bool, int]:
    # in the newest names all but the head is in `model`, and so is `language_model`
    return (
        not name.startswith("language_model."),
        f".{_WITHIN_TOWER}." not in name,
        name.startswith("model.") or name == "lm_head",
        len(name),
    )


def _moved(old: str, new: str) -> tuple[str, str]:
    """Return the different beginnings of two names; the parts after them are the same."""
    one, other = old.split("."), new.split(".")
    while len(one) > 1 and len(other) > 1 and one[-2:] == other[-2:]:
        one, other = one[:-1], other[:-1]
    return ".".join(one), ".".join(other)


def _relocated(name: str, moved: Mapping[str, str]) -> str:
    """Return the name with the moved beginning of its neighbours, so that all names fit."""
    for old in sorted(moved, key=len, reverse=True):
        if f"{name}.".startswith(f"{old}.") and not f"{name}.".startswith(f"{moved[old]}."):
            return moved[old] + name.removeprefix(old)
    return name
