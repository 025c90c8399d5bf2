"""YAML and `--set` to a configuration, with every problem told at once."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fedllm.config.models import Config
from fedllm.errors import ConfigError

ENVIRONMENT = {"model.path": "FEDLLM_MODEL", "data.path": "FEDLLM_DATA"}
_UNION_MEMBERS = {"str", "int", "float", "HeldOutSection"}
_LIMITS = {"greater_than_equal": (">=", "ge"), "greater_than": (">", "gt")}
_LIMITS |= {"less_than_equal": ("<=", "le"), "less_than": ("<", "lt")}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: `2:00:00` is a text (not 7200) and `1e-4` a number (not a text)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^([-+]?[0-9]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply `key=value` overrides, `a.b=c` by `a.b=c`.

    Raises:
        ConfigError: one line per problem, each with path, value and remedy.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; see configs/ for examples")
    raw = _parse(path.read_text(encoding="utf-8"), str(path))
    for override in overrides:
        _apply(raw, override)
    _from_environment(raw)
    return validate(raw)


def read_config(path: Path) -> Config:
    """Read the resolved configuration of a run."""
    if not path.is_file():
        raise ConfigError(f"{path.parent}: not a run directory (no {path.name}); see `fedllm run`")
    return validate(_parse(path.read_text(encoding="utf-8"), str(path)))


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Return `config` with `key=value` overrides applied."""
    raw = config.model_dump(mode="json")
    for override in overrides:
        _apply(raw, override)
    return validate(raw)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    raw = config.model_dump(mode="json")
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def validate(raw: Mapping[str, Any]) -> Config:
    """Return the model of a raw configuration.

    Raises:
        ConfigError: one line per problem.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error))) from error


def flatten(
    config: BaseModel, prefix: str = "", kind: str = "result"
) -> dict[str, tuple[str, Any]]:
    """Return every key as dotted path with its kind and value.

    The kind is `result`, `execution` or `may grow`.
    """
    keys: dict[str, tuple[str, Any]] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        own = str(extra.get("kind", kind)) if isinstance(extra, dict) else kind
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            keys |= flatten(value, f"{prefix}{name}.", own)
        else:
            dumped = config.model_dump(mode="json", include={name})[name]
            keys[f"{prefix}{name}"] = (own, dumped)
    return keys


def result_fingerprint(config: Config) -> str:
    """Return the SHA-256 of all result keys."""
    result = {key: value for key, (kind, value) in flatten(config).items() if kind == "result"}
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid"
        raise ConfigError(f"{where}:{line} is not YAML ({problem}); correct it") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: got a {type(raw).__name__}, need keys and values")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: need KEY=VALUE, for example --set rounds=5")
    value = yaml.load(text, _Loader) if text else None
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = {}
            node[parent] = child
        node = child
    node[last] = value


def _from_environment(raw: dict[str, Any]) -> None:
    for key, variable in ENVIRONMENT.items():
        section, name = key.split(".")
        given = os.environ.get(variable)
        part = raw.setdefault(section, {})
        if isinstance(part, dict) and part.get(name) is None:
            if given is None:
                raise ConfigError(
                    f"{key}: not given; set it in the file, with --set {key}=PATH or ${variable}"
                    " (`embedded` needs no download)"
                )
            part[name] = given


def _lines(error: ValidationError) -> Iterator[str]:
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for problem in error.errors():
        by_key.setdefault(".".join(_real_parts(problem["loc"])), []).append(problem)
    for key, problems in by_key.items():
        # a key of several forms reports each form that does not fit; the deepest one says most
        if not any(other.startswith(f"{key}.") for other in by_key):
            yield _line(key, problems)


def _line(key: str, problems: Sequence[Mapping[str, Any]]) -> str:
    problem = next((p for p in problems if p["type"] in _LIMITS), problems[0])
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}"
    if kind == "missing":
        return f"{key}: missing; add it"
    if kind in _LIMITS:
        sign, name = _LIMITS[kind]
        return f"{key}: got {found}, need {sign} {problem['ctx'][name]}"
    if kind == "value_error":
        return f"{key}: got {found!r}, {problem['msg'].removeprefix('Value error, ')}"
    needs = dict.fromkeys(
        p["msg"].removeprefix("Input should be ").split(", unable")[0] for p in problems
    )
    return f"{key}: got {found!r}, need {' or '.join(needs)}"


def _real_parts(location: Sequence[str | int]) -> list[str]:
    """Drop the names of union members that pydantic adds to a location."""
    return [str(p) for p in location if not _is_union_member(str(p))]


def _is_union_member(part: str) -> bool:
    return "[" in part or part.startswith(("constrained-", "literal")) or part in _UNION_MEMBERS


def _nearest(key: str) -> str:
    *parents, last = key.split(".")
    names = _keys_below(Config, parents)
    close = difflib.get_close_matches(last, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{'.'.join([*parents, close[0]])}`?"
    everywhere = [name for name in _all_keys(Config) if name.split(".")[-1] == last]
    if everywhere:
        return f"; did you mean `{everywhere[0]}`?"
    return f"; valid here: {', '.join(sorted(names))}" if names else ""


def _keys_below(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    if not parents:
        return list(model.model_fields)
    field = model.model_fields.get(parents[0])
    if field is None:
        return []
    if _is_section(field.annotation):
        return _keys_below(field.annotation, parents[1:])
    for member in get_args(field.annotation):
        if _is_section(member):
            # a table of sections, as clients.tiers.<name>: the user's name is passed over
            return _keys_below(member, parents[2:])
    return []


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if _is_section(field.annotation):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
