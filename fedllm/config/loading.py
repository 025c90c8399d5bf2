"""Configurations from YAML and `--set`; all problems are reported at once."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fedllm.config.models import Config
from fedllm.config.presets import PRESETS_KEY, with_presets
from fedllm.config.problems import is_section, problem_lines
from fedllm.config.spelling import is_null, resolve_scalars
from fedllm.config.sweep_files import BASE
from fedllm.config.yaml_text import parse_yaml, read_yaml, write_yaml
from fedllm.errors import ConfigError

ENVIRONMENT = {"model.path": "FEDLLM_MODEL", "data.path": "FEDLLM_DATA"}
# keys of earlier versions that changed no result: a run that has them in its file ignores them
_REMOVED_KEYS = (("aggregation", "fold_ahead"),)
# result keys of later versions: at these values a run keeps the fingerprint that it began with
_ADDED_KEYS: Mapping[str, Any] = {
    "model.quantization": "none",
    "method.options": {},
    "method.local_options": {},
    "clients.cohort.sampling": "fixed",
    "clients.cohort.tiers": None,
    "clients.unseen_categories": [],
    "clients.ranks": "tiers",
    "clients.fit_ranks": [2, 4, 8, 16, 32, 64],
    "aggregation.weights": "rows",
    "privacy.clip_norm": None,
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-5,
    "method.server": "none",
    "method.server_options": {},
    "training.engine": "plain",
    "training.processes": 1,
    "training.zero.stage": 3,
    "training.zero.offload": "none",
    "training.deepspeed": {},
    "training.cut_rounds": [],
    "training.cut_factor": 0.1,
    "data.partition.kind": "column",
    "data.partition.clients": None,
    "data.partition.alpha": 0.5,
    "data.partition.categories": 2,
    "data.partition.min_rows": 2,
    "data.partition.seed": 0,
    "evaluation.rougeL_published": False,
}
_ADDED_TIER_KEYS = ("engine", "processes")  # null: as before
# a key's parts, and its new value
_Assignment = tuple[tuple[str, ...], Any]
# setting one of these keys unsets the other
_EXCLUSIVE_KEYS = {"clients.cohort.count": "fraction", "clients.cohort.fraction": "count"}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply `key=value` overrides, one after the other.

    Raises:
        ConfigError: one line per problem, each with path, value and remedy.
    """
    return _load(path, [_parse_override(override) for override in overrides])


def load_changed(path: Path, changes: Mapping[str, Any]) -> Config:
    """Read a configuration file with other values for some keys.

    Args:
        path: the file.
        changes: dotted key -> value, as `parse_yaml` returns it.

    Raises:
        ConfigError: one line per problem, each with path, value and remedy.
    """
    return _load(path, [(tuple(key.split(".")), value) for key, value in changes.items()])


def _load(path: Path, assignments: Sequence[_Assignment]) -> Config:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; see configs/ for examples")
    raw = read_yaml(path)
    if BASE in raw:
        raise ConfigError(
            f"{path}: a sweep file, but this command needs a configuration; to run the sweep: "
            f"fedllm sweep {path}"
        )
    _apply_all(raw, assignments)
    presets = raw.pop(PRESETS_KEY, None)
    raw = resolve_scalars(raw, Config)
    _drop_empty_sections(raw, Config)
    if presets is not None:
        raw = with_presets(raw, presets)
    _read_deepspeed(raw)
    return _validated(raw, list(_take_from_environment(raw)))


def read_config(path: Path) -> Config:
    """Read the resolved configuration of a run."""
    if not path.is_file():
        raise ConfigError(
            f"{path.parent}: not a run directory (no {path.name}); `fedllm run CONFIG` starts a run"
        )
    status = path.stat()
    version = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    return _read_version(path, version)


@lru_cache(maxsize=4)
def _read_version(path: Path, _version: tuple[int, ...]) -> Config:
    """Read a configuration; a command asks several times for the same."""
    raw = resolve_scalars(read_yaml(path), Config)
    if not raw:
        raise ConfigError(
            f"{path}: empty; `fedllm run CONFIG --run-dir {path.parent}`, with the configuration "
            "that the run was begun with, makes it again"
        )
    for section, key in _REMOVED_KEYS:
        if isinstance(part := raw.get(section), dict):
            part.pop(key, None)
    try:
        return validate(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Return `config` with `key=value` overrides applied."""
    raw = config.model_dump(mode="json")
    _apply_all(raw, [_parse_override(override) for override in overrides])
    raw = resolve_scalars(raw, Config)
    _read_deepspeed(raw)
    return validate(raw)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return write_yaml(config.model_dump(mode="json"))


def validate(raw: Mapping[str, Any]) -> Config:
    """Return the model of a raw configuration.

    Raises:
        ConfigError: one line per problem.
    """
    return _validated(raw, [])


def _validated(raw: Mapping[str, Any], problems: Sequence[str]) -> Config:
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join([*problems, *problem_lines(error, raw)])) from error
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def flatten(
    config: BaseModel, prefix: str = "", kind: str = "result"
) -> dict[str, tuple[str, Any]]:
    """Return every key as a dotted path, with its kind and value.

    The kind is `result`, `execution` or `may grow`. The value of a table of sections, such as
    `clients.tiers`, is the list of its names: their order decides which client is in which tier.
    """
    keys: dict[str, tuple[str, Any]] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        own = str(extra.get("kind", kind)) if isinstance(extra, dict) else kind
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            keys |= flatten(value, f"{prefix}{name}.", own)
        elif isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
            keys[f"{prefix}{name}"] = (own, list(value))
            for member, section in value.items():
                keys |= flatten(section, f"{prefix}{name}.{member}.", own)
        else:
            dumped = config.model_dump(mode="json", include={name})[name]
            keys[f"{prefix}{name}"] = (own, dumped)
    return keys


def result_fingerprint(config: Config) -> str:
    """Return the SHA-256 of all result keys."""
    result = {
        key: value
        for key, (kind, value) in flatten(config).items()
        if kind == "result" and not _is_as_before(key, value)
    }
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _is_as_before(key: str, value: Any) -> bool:
    """Return whether a key of a later version says what was so before there was that key."""
    if key in _ADDED_KEYS:
        return bool(value == _ADDED_KEYS[key])
    is_of_tier = key.startswith("clients.tiers.") and key.endswith(_ADDED_TIER_KEYS)
    return is_of_tier and value is None


def _apply_all(raw: dict[str, Any], assignments: Sequence[_Assignment]) -> None:
    for key, value in assignments:
        other = _EXCLUSIVE_KEYS.get(".".join(key))
        if other and not is_null(value) and (*key[:-1], other) not in {k for k, _ in assignments}:
            _apply(raw, (*key[:-1], other), None)
        _apply(raw, key, value)


def _parse_override(override: str) -> _Assignment:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: need KEY=VALUE, for example --set rounds=5")
    return tuple(key.split(".")), parse_yaml(text.encode(), f"--set {override}")


def _apply(raw: dict[str, Any], key: Sequence[str], value: Any) -> None:
    *parents, last = key
    node = raw
    for parent in parents:
        child = node.get(parent)
        if not isinstance(child, dict):
            child = {}
            node[parent] = child
        node = child
    node[last] = value


def _drop_empty_sections(raw: dict[str, Any], model: type[BaseModel]) -> None:
    """Remove sections that are null: in YAML, a section is null if all its keys are comments."""
    for name, field in model.model_fields.items():
        if not is_section(field.annotation):
            continue
        if name in raw and raw[name] is None:
            del raw[name]
        if isinstance(raw.get(name), dict):
            _drop_empty_sections(raw[name], field.annotation)


def _read_deepspeed(raw: dict[str, Any]) -> None:
    """Put the content of a file of DeepSpeed's keys in the place of its path."""
    training = raw.get("training")
    path = training.get("deepspeed") if isinstance(training, dict) else None
    if not isinstance(training, dict) or not isinstance(path, str):
        return
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"training.deepspeed: {path}: no such file; need keys and values of DeepSpeed, or a "
            "JSON or YAML file of them, such as configs/deepspeed/small_buckets.json"
        )
    training["deepspeed"] = resolve_scalars(read_yaml(file))


def _take_from_environment(raw: dict[str, Any]) -> Iterator[str]:
    """Fill in missing paths from the environment; yield a problem for each that stays missing."""
    for key, variable in ENVIRONMENT.items():
        section, name = key.split(".")
        part = raw.setdefault(section, {})
        if not isinstance(part, dict) or part.get(name) is not None:
            continue
        part.pop(name, None)
        if path := os.environ.get(variable):
            part[name] = path
            continue
        yield (
            f"{key}: not given; set it in the file, with --set {key}=PATH or ${variable}"
            " (`embedded` needs no download)"
        )
