"""Which module of the base a tensor of an adapter belongs to, whatever the model was wrapped in.

A key is `base_model.model.<module>.lora_A.weight`. Around the model or any part of it,
torch.compile, FSDP, DDP and activation checkpointing put names of their own; a dictionary that did
not pass through PEFT also holds the adapter's name. Vision-language models got other names for the
same modules with transformers 4.52 and 5, which PEFT and transformers read as one
(`transformers.conversion_mapping`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# parts that stand for no module of the base
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
_OUTERMOST = "module"  # of DDP and DeepSpeed, around a whole model
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>[^.]+))?\.weight")
# parts that say where in the whole the language model stands: before, within or after one another
_STRUCTURE = frozenset({"model", "language_model", "llm", "thinker"})
_WITHIN_TOWER = "vision_model"  # between a tower and its layers, until transformers 5
_RENAMED = {"embed_out": "lm_head"}  # of GPT-NeoX, until transformers 5
_COPIED = ("embed_tokens", "lm_head")  # as PEFT knows embedding layers by name
_LITERAL = re.compile(r"\^?(?P<name>[\w.\\-]+?)\$?")


@dataclass(frozen=True, kw_only=True)
class FactorKey:
    """What the name of a tensor says: A or B (`part`) of which module."""

    module: str
    part: str


def factor_key(tensor: str) -> FactorKey | None:
    """Return which factor of which module a tensor is; None where it is none."""
    name = _unwrapped(tensor)
    if not name.startswith(_PREFIX):
        return None
    found = _FACTOR.fullmatch(_unwrapped(name.removeprefix(_PREFIX)))
    return FactorKey(module=found["module"], part=found["part"]) if found else None


def base_key(tensor: str) -> str | None:
    """Return the weight or bias of the base that a tensor of an adapter is a copy of, or None.

    PEFT saves that of `lm_head` and of the embedding where they are among the targets.
    """
    name = _unwrapped(tensor)
    if not name.startswith(_PREFIX):
        return None
    name = _unwrapped(name.removeprefix(_PREFIX)).replace(".base_layer.", ".")
    owner, _, kind = name.rpartition(".")
    is_copy = kind in ("weight", "bias") and owner.rpartition(".")[2] in _COPIED
    return name if is_copy else None


def place_of(module: str) -> str:
    """Return a name that is the same for all names that the module has had.

    Two modules of one model have two places.
    """
    parts = [part for part in _unwrapped(module).split(".") if part not in _STRUCTURE]
    kept = [part for at, part in enumerate(parts) if not (at and part == _WITHIN_TOWER)]
    if len(kept) == 1:
        kept = [_RENAMED.get(kept[0], kept[0])]
    return ".".join(kept) or module


def same_place(pattern: str, module: str) -> bool:
    """Say whether a pattern of a configuration is a whole name of the module, any that it had."""
    literal = _LITERAL.fullmatch(pattern)
    return literal is not None and place_of(literal["name"].replace("\\", "")) == place_of(module)


def common_names(names: Sequence[Iterable[str]]) -> dict[str, str]:
    """Return one name for each module that several adapters name: every name -> that one.

    The name that all give it; where two give it two, the one of the newest transformers.
    """
    called: dict[str, list[str]] = {}
    for module in dict.fromkeys(name for adapter in names for name in adapter):
        called.setdefault(place_of(module), []).append(module)
    chosen = {place: max(found, key=_newness) for place, found in called.items()}
    moved = dict(
        _moved(module, chosen[place])
        for place, found in called.items()
        for module in found
        if module != chosen[place]
    )
    return {
        module: _relocated(chosen[place], moved)
        for place, found in called.items()
        for module in found
    }


def names_in(modules: Iterable[str], base: Iterable[str]) -> dict[str, str]:
    """Return the base's own name of each module; a module that it has not is left out."""
    known = list(base)
    places = {place_of(name): name for name in known}
    own = set(known)
    found = {
        module: module if module in own else places.get(place_of(module)) for module in modules
    }
    return {module: name for module, name in found.items() if name is not None}


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _OUTERMOST:
        parts = parts[1:]
    return ".".join(parts)


def _newness(name: str) -> tuple[bool, bool, bool, int]:
    # today all but the head stands within `model`, and the language model by its name
    return (
        not name.startswith("language_model."),
        f".{_WITHIN_TOWER}." not in name,
        name.startswith("model.") or name == "lm_head",
        len(name),
    )


def _moved(old: str, new: str) -> tuple[str, str]:
    """Return what the two names begin with, up to the first part from which they are the same."""
    one, other = old.split("."), new.split(".")
    while len(one) > 1 and len(other) > 1 and one[-2:] == other[-2:]:
        one, other = one[:-1], other[:-1]
    return ".".join(one), ".".join(other)


def _relocated(name: str, moved: Mapping[str, str]) -> str:
    """Return the name as its neighbours are named: all names of a result are of one time."""
    for old in sorted(moved, key=len, reverse=True):
        if f"{name}.".startswith(f"{old}.") and not f"{name}.".startswith(f"{moved[old]}."):
            return moved[old] + name.removeprefix(old)
    return name
