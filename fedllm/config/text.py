"""YAML as people write it: YAML 1.2's numbers, no surprises, no key twice."""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedllm.errors import ConfigError

# YAML 1.1 reads 2:00:00 as 7200, 010 as 8, 2026-01-01 as a date and 1e-4 as a text
_INT = re.compile(r"^([-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"
)
_REPLACED = (":int", ":float", ":timestamp")
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_REPLACED)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    """Reads with our resolvers and refuses a key that is given twice."""

    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, (key, _) in enumerate(node.value):
            # merged defaults (`<<: *base`) may be given again
            if isinstance(key, yaml.ScalarNode) and key.value in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key.value}` is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever our loader would take for something else than a text."""

    yaml_implicit_resolvers = _RESOLVERS


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or something else than keys and values.
    """
    try:
        raw = parse_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: got a {type(raw).__name__}, need keys and values")
    return raw


def parse_yaml(text: bytes, where: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigError: it is not YAML; names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark and mark.line else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid"
        raise ConfigError(f"{where}:{line} is not YAML ({problem}); correct it") from error


def write_yaml(raw: Mapping[str, Any]) -> str:
    """Return YAML that reads back as `raw`."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
