"""Unquoted YAML values: `no` is a text where a key expects text, else it is false.

YAML itself decides by the spelling whether a value is a boolean, a number, null or a text. Here
the type that the key expects decides: an id, a name or a path keeps its spelling.
"""

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

# options of sbatch whose value is a name, never a boolean
_NAME_OPTIONS = (
    *("account", "partition", "qos", "reservation", "constraint", "prefer", "nodelist", "exclude"),
    *("clusters", "licenses", "job-name", "comment", "wckey", "mcs-label", "mail-user"),
)


# zero bytes, and halves of UTF-16 pairs, which YAML can spell: no system takes them
_UNUSABLE = re.compile("[\\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class UnquotedScalar:
    """Boolean, number or null that is written without quotes, with its spelling."""

    value: bool | int | float | None
    spelling: str


def resolve_scalars(raw: Any, expected: Any = Any) -> Any:
    """Return `raw` with a plain value for every `UnquotedScalar`: text where text is expected.

    Args:
        raw: what `parse_yaml` returns, or a part of it.
        expected: the type annotation of the key that holds it.
    """
    types_ = list(_types_of(expected))
    if isinstance(raw, UnquotedScalar):
        return _resolve_scalar(raw, types_)
    if isinstance(raw, Mapping):
        return {key: _resolve_value(key, value, types_) for key, value in raw.items()}
    if isinstance(raw, list):
        item = next((get_args(type_)[0] for type_ in types_ if get_origin(type_) is tuple), Any)
        return [_resolve_member(value, item) for value in raw]
    return raw


def misread(value: Any, expected: Any) -> str | None:
    """Return why a value is not what its key expects although pydantic would take it.

    A boolean is no number. A text without a zero byte or half a character can be a path.
    """
    types_ = list(_types_of(expected))
    if isinstance(value, bool):
        is_number = (int in types_ or float in types_) and bool not in types_
        return "need a number" if is_number else None
    if isinstance(value, str):
        return "need text without zero bytes" if _UNUSABLE.search(value) else None
    if isinstance(value, Mapping):
        tables = [get_args(type_)[1] for type_ in types_ if get_origin(type_) is dict]
        return next(filter(None, (misread(v, t) for t in tables for v in value.values())), None)
    if isinstance(value, list | tuple):
        items = [get_args(type_)[0] for type_ in types_ if get_origin(type_) is tuple]
        return next(filter(None, (misread(v, t) for t in items for v in value)), None)
    return None


def is_null(raw: Any) -> bool:
    """Return whether a value is null, however it is spelled."""
    return raw is None or (isinstance(raw, UnquotedScalar) and raw.value is None)


def _types_of(expected: Any) -> Iterator[Any]:
    """Yield the types of an annotation, the members of a union one by one."""
    origin = get_origin(expected)
    if origin is Annotated:
        yield from _types_of(get_args(expected)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(expected):
            yield from _types_of(member)
    else:
        yield expected


def _resolve_value(key: str, value: Any, types_: list[Any]) -> Any:
    """Return the plain value of a key, in a section or in a table of names or options."""
    for type_ in types_:
        if isinstance(type_, type) and issubclass(type_, BaseModel):
            field = type_.model_fields.get(key)
            return resolve_scalars(value, Any if field is None else field.annotation)
        if get_origin(type_) is dict:
            flag = key.strip().removeprefix("--").replace("_", "-")
            is_boolean = isinstance(value, UnquotedScalar) and type(value.value) is bool
            if is_boolean and flag in _NAME_OPTIONS:
                return value.spelling
            return _resolve_member(value, get_args(type_)[1])
    return resolve_scalars(value)


def _resolve_member(value: Any, expected: Any) -> Any:
    """Return the plain value of a list's or table's member; `null` may be a name there."""
    types_ = list(_types_of(expected))
    is_name = str in types_ and types.NoneType not in types_
    if is_name and isinstance(value, UnquotedScalar) and value.spelling:
        return value.spelling
    return resolve_scalars(value, expected)


def _resolve_scalar(scalar: UnquotedScalar, types_: list[Any]) -> Any:
    value, spelling = scalar.value, scalar.spelling
    if value is None or str not in types_:
        return value
    # sbatch takes texts, numbers and flags: 08, which Python writes 8, may be a name
    if type(value) is bool:
        return value if bool in types_ else spelling
    return value if type(value) in types_ and str(value) == spelling else spelling
