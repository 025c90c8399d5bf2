"""Reference of the configuration: every key with its type, default, kind and meaning.

All of it is read from the models; the meaning is the text below the key's field. The tables of
docs/configuration.md, the schema for editors and the completion of `--set` come from here.
"""

import ast
import functools
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedllm.config.loading import ENVIRONMENT
from fedllm.config.models import LARGEST_COUNT, Config
from fedllm.config.problems import is_section

REQUIRED = "required"
MAY_GROW = "may grow"
_BOUNDS = {"ge": ("≥", max), "gt": (">", max), "le": ("≤", min), "lt": ("<", min)}
_NOUNS: Mapping[Any, str] = {int: "integer", float: "number", str: "text", Any: "value"}
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


@dataclass(frozen=True, kw_only=True)
class KeyEntry:
    """A key as people read it; `values` are the words that it is chosen from, if it is."""

    name: str
    type: str
    values: tuple[str, ...]
    default: str
    kind: str
    meaning: str


def key_entries() -> Iterator[KeyEntry]:
    """Yield every key of a configuration file, in the order of the models.

    `NAME` stands for a name that the user chooses, as in `clients.tiers.NAME.ranks`.
    """
    yield from _entries(Config, "", "result")


def option_entries(options: type[BaseModel]) -> Iterator[KeyEntry]:
    """Yield the options of a method, of a client side, or of the server's optimizer."""
    yield from _entries(options, "", "result")


def plain(meaning: str) -> str:
    """Return a meaning without its links, for places that have no pages."""
    return _LINK.sub(r"\1", meaning)


def meanings(section: type[BaseModel]) -> Mapping[str, str]:
    """Return field -> the text below it in the source of its class, on one line.

    The fields of the classes that it extends have theirs there.
    """
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if issubclass(each, BaseModel) and each is not BaseModel:
            found |= _texts_of(each.__module__).get(each.__name__, {})
    return found


@functools.cache
def _texts_of(module: str) -> Mapping[str, Mapping[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_texts(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _texts(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        match below:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield field.target.id, " ".join(text.split())


def _entries(
    section: type[BaseModel], prefix: str, kind: str, defaults: BaseModel | None = None
) -> Iterator[KeyEntry]:
    """Yield the keys of a section; `defaults` is what the key has that holds it."""
    texts = meanings(section)
    for name, field in section.model_fields.items():
        key, extra = f"{prefix}{name}", field.json_schema_extra
        own = str(extra.get("kind", kind)) if isinstance(extra, dict) else kind
        default = getattr(defaults, name) if defaults else field.default
        if is_section(field.annotation):
            assert isinstance(field.annotation, type)
            inside = default if isinstance(default, BaseModel) else None
            yield from _entries(field.annotation, f"{key}.", own, inside)
            continue
        yield KeyEntry(
            name=key,
            type=_type_text(field.annotation, field.metadata),
            values=tuple(_values(field.annotation)),
            default=f"${ENVIRONMENT[key]}" if key in ENVIRONMENT else _value_text(default),
            kind=own,
            meaning=texts.get(name, ""),
        )
        for inner, member in _inner_sections(field.annotation):
            yield from _entries(member, f"{key}.{inner}", own)


def _inner_sections(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the sections that a value may be or hold, each with what comes before its keys."""
    if is_section(annotation):
        yield "", annotation
    elif get_origin(annotation) is dict and is_section(get_args(annotation)[1]):
        yield "NAME.", get_args(annotation)[1]
    elif _is_union(annotation):
        for member in get_args(annotation):
            yield from _inner_sections(member)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _value_text(value: Any) -> str:
    """Return a value as YAML on one line."""
    if value is PydanticUndefined:
        return REQUIRED
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, float):
        return str(value) if "e" not in str(value) else format(Decimal(str(value)), "f")
    return json.dumps(value)


def _values(annotation: Any) -> Iterator[str]:
    """Yield the words that a value is chosen from."""
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) is Annotated:
        yield from _values(get_args(annotation)[0])
    elif _is_union(annotation):
        for member in get_args(annotation):
            yield from _values(member)


def _type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return what a value may be: `integer ≥ 1`, or the words that it is chosen from."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [each for info in arguments[1:] for each in getattr(info, "metadata", [info])]
        return _type_text(arguments[0], inner)
    if _is_union(annotation):
        return _joined([_type_text(each) for each in arguments if each is not types.NoneType])
    if annotation is bool or origin is Literal:
        return ", ".join(f"`{value}`" for value in _values(annotation))
    if origin is tuple:
        text = _type_text(arguments[0])
        if text.startswith("`"):
            return f"list of {text}"
        noun, _, bounds = text.partition(" ")
        return f"list of {noun}s {bounds}".rstrip()
    if origin is dict or is_section(annotation):
        return "table"
    return f"{_NOUNS[annotation]} {_bounds_text(metadata)}".rstrip()


def _bounds_text(metadata: Sequence[Any]) -> str:
    """Return the narrowest bounds: `≥ 1 and ≤ 1024`; the largest count of all is no news."""
    parts = []
    for name, (sign, narrowest) in _BOUNDS.items():
        limits = [getattr(each, name) for each in metadata if getattr(each, name, None) is not None]
        if limits and (limit := narrowest(limits)) != LARGEST_COUNT:
            parts.append(f"{sign} {limit}")
    return " and ".join(parts)


def _joined(parts: Sequence[str]) -> str:
    once = list(dict.fromkeys(parts))
    return once[0] if len(once) == 1 else f"{', '.join(once[:-1])} or {once[-1]}"
