"""Values as people wrote them: `no` is a name where a name is expected, else it is false.

YAML tells booleans, numbers and null from texts by their spelling alone. What is expected of a key
decides: an id, a name or a path keeps its spelling.
"""

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

# options of sbatch whose value is a name, never a yes or a no
_NAMED = (
    *("account", "partition", "qos", "reservation", "constraint", "prefer", "nodelist", "exclude"),
    *("clusters", "licenses", "job-name", "comment", "wckey", "mcs-label", "mail-user"),
)


@dataclass(frozen=True, kw_only=True)
class Spelt:
    """A boolean, number or null that is written without quotes, and how it is spelled."""

    value: bool | int | float | None
    spelling: str


def as_meant(raw: Any, expected: Any = Any) -> Any:
    """Return values where `raw` has spellings, texts where texts are expected.

    Args:
        raw: what `parse_yaml` returns, or a part of it.
        expected: the annotation of what it is for.
    """
    kinds = list(_kinds(expected))
    if isinstance(raw, Spelt):
        return _settled(raw, kinds)
    if isinstance(raw, Mapping):
        return {key: _member(key, value, kinds) for key, value in raw.items()}
    if isinstance(raw, list):
        within = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        return [_named(value, within) for value in raw]
    return raw


def is_null(raw: Any) -> bool:
    """Say whether a value is null, however it is spelled."""
    return raw is None or (isinstance(raw, Spelt) and raw.value is None)


def _kinds(expected: Any) -> Iterator[Any]:
    """Yield the types of an annotation, those of a union one by one."""
    origin = get_origin(expected)
    if origin is Annotated:
        yield from _kinds(get_args(expected)[0])
    elif origin in (Union, types.UnionType):
        for each in get_args(expected):
            yield from _kinds(each)
    else:
        yield expected


def _member(key: str, value: Any, kinds: list[Any]) -> Any:
    """Return the value of a key in a section, or in a table of names or options."""
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(key)
            return as_meant(value, Any if field is None else field.annotation)
        if get_origin(kind) is dict:
            within = get_args(kind)[1]
            flag = key.strip().removeprefix("--").replace("_", "-")
            is_name = isinstance(value, Spelt) and type(value.value) is bool and flag in _NAMED
            return value.spelling if is_name else _named(value, within)
    return as_meant(value)


def _named(value: Any, expected: Any) -> Any:
    """Return a member of a list or table, where nulls that are written out are names as well."""
    kinds = list(_kinds(expected))
    is_name = str in kinds and types.NoneType not in kinds
    if is_name and isinstance(value, Spelt) and value.spelling:
        return value.spelling
    return as_meant(value, expected)


def _settled(scalar: Spelt, kinds: list[Any]) -> Any:
    value, spelling = scalar.value, scalar.spelling
    if value is None or str not in kinds:
        return value
    # sbatch takes texts, numbers and flags: a number of another spelling may be a name
    if type(value) is bool:
        return value if bool in kinds else spelling
    return value if type(value) in kinds and str(value) == spelling else spelling
