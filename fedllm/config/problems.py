"""Problems of a configuration as lines, one per key: path, value and remedy."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel, ValidationError

from fedllm.config.models import WHOLE_LINES, Config

_LIMITS = {
    "greater_than_equal": (">=", "ge"),
    "greater_than": (">", "gt"),
    "less_than_equal": ("<=", "le"),
    "less_than": ("<", "lt"),
}
_NEEDS = {
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "too_short": "at least one",
}

_MAX_LINES = 40
_MAX_LETTERS = 200
# what users know from elsewhere and look for here -> why there is no such key, and what to do
_ABSENT = {
    "training.compile": "no such key: packed passes differ in length and parts from step to step, "
    "so that torch.compile compiles again until it gives up (its recompile limit); remove it"
}

_Problem = Mapping[str, Any]


def problem_lines(
    error: ValidationError,
    raw: Mapping[str, Any],
    model: type[BaseModel] = Config,
    prefix: str = "",
) -> Iterator[str]:
    """Yield one line for every wrong key.

    Args:
        error: what pydantic raised.
        raw: the values that were validated.
        model: the model that refused them.
        prefix: the path of the model's keys, with its last dot.
    """
    by_key: dict[str, list[_Problem]] = {}
    for problem in error.errors():
        key = ".".join(_key_parts(problem["loc"], problem["type"], raw))
        by_key.setdefault(key, []).append(problem)
    above = {parent for key in by_key for parent in _parents(key)}
    # pydantic reports every member of a union that does not fit; the deepest key helps most
    deepest = [key for key in by_key if key not in above]
    for key in deepest[:_MAX_LINES]:
        problems = by_key[key]
        unknown = problems[0]["type"] == "extra_forbidden"
        guess = _suggestion(key, model, prefix) if unknown else ""
        yield _line(f"{prefix}{key}", problems, guess)
    if len(deepest) > _MAX_LINES:
        yield f"... and {len(deepest) - _MAX_LINES:,} more problems"


def _parents(key: str) -> Iterator[str]:
    """Yield the dotted keys above a key."""
    parts = key.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Return whether a field's annotation is a section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _key_parts(location: Sequence[str | int], kind: str, raw: Any) -> Iterator[str]:
    """Yield the keys of a location that the user wrote; pydantic adds names of union members."""
    node = raw
    for part in location:
        children = dict(enumerate(node)) if isinstance(node, list | tuple) else node
        if isinstance(children, dict) and part in children:
            node = children[part]
            yield str(part)
        elif kind == "missing" and part is location[-1]:
            yield str(part)


def _line(key: str, problems: Sequence[_Problem], guess: str) -> str:
    problem = next((p for p in problems if p["type"] in _LIMITS), problems[0])
    kind, value = problem["type"], problem["input"]
    if kind == WHOLE_LINES:
        return str(problem["msg"])
    if kind == "extra_forbidden":
        return f"{key}: {_ABSENT.get(key) or f'unknown key{guess}'}"
    if kind == "missing":
        return f"{key}: missing; add it"
    value = _Shown(value)
    if kind in _LIMITS:
        sign, name = _LIMITS[kind]
        return f"{key}: got {value}, need {sign} {problem['ctx'][name]}"
    if kind == "value_error":
        return f"{key}: got {value!r}, {problem['msg'].removeprefix('Value error, ')}"
    return f"{key}: got {value!r}, need {' or '.join(dict.fromkeys(map(_need, problems)))}"


class _Shown:
    """A wrong value, in a length that people read."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __str__(self) -> str:
        return self._short(str(self._value))

    def __repr__(self) -> str:
        return self._short(repr(self._value))

    @staticmethod
    def _short(text: str) -> str:
        return text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]}..."


def _need(problem: _Problem) -> str:
    message: str = problem["msg"]
    need = message.removeprefix("Input should be ").split(", unable")[0]
    return _NEEDS.get(problem["type"], need)


def _suggestion(key: str, model: type[BaseModel], prefix: str) -> str:
    *parents, last = key.split(".")
    names = _keys_below(model, parents)
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{prefix}{'.'.join([*parents, close[0]])}`?"
    everywhere = [name for name in _all_keys(model) if name.split(".")[-1] == last]
    if everywhere:
        return f"; did you mean `{prefix}{everywhere[0]}`?"
    return f"; valid here: {', '.join(sorted(names))}"


def _keys_below(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    # a user's key may have a dot of its own: its parts are no sections
    if not parents or parents[0] not in model.model_fields:
        return list(model.model_fields)
    annotation = model.model_fields[parents[0]].annotation
    if is_section(annotation):
        return _keys_below(annotation, parents[1:])
    section = next(member for member in get_args(annotation) if is_section(member))
    # skip the user's own name in a table of sections, such as clients.tiers.<name>
    return _keys_below(section, parents[2:])


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if is_section(field.annotation):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
