"""YAML files of people: numbers as in YAML 1.2, spellings kept, no key given twice."""

import codecs
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedllm.config.spelling import UnquotedScalar
from fedllm.errors import ConfigError

# YAML 1.1 reads 2:00:00 as 7200, 010 as 8, 2026-01-01 as a date and 1e-4 as a text
_INT = re.compile(r"^([-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^([-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"
)
# aliases counted as often as they are used; a configuration of a thousand tiers has less
_MAX_VALUES = 20_000
_MAX_BYTES = 1 << 19
# of lists and tables within `[` and `{`
_MAX_DEPTH = 50
_REPLACED_TAGS = (":int", ":float", ":timestamp")
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(_REPLACED_TAGS)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


_BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16: the marks of UTF-32 begin with those of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class _Loader(yaml.SafeLoader):
    """YAML loader that has our resolvers, keeps spellings and refuses a key given twice."""

    yaml_implicit_resolvers = _RESOLVERS

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; refuse one whose aliases stand for too many values."""
        node = super().compose_node(parent, index)
        if node is not None and id(node) not in self._values:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            each = [part for pair in parts for part in (pair if type(pair) is tuple else (pair,))]
            # a node that contains itself is not counted yet: it is refused later
            count = 1 + sum(self._values.get(id(part), 0) for part in each)
            if max(count, len(self._values)) >= _MAX_VALUES:
                raise yaml.composer.ComposerError(
                    None, None, f"more than {_MAX_VALUES:,} values", node.start_mark
                )
            self._values[id(node)] = count
        return node

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        """Begin a list or table in brackets; refuse one too deep: the time grows as its square."""
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # a key of merged defaults (`<<: *base`) may be given again
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key.value}` is given twice", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        self.flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"  # a key is a name, however it is spelled
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ARG002
        """Return the value of a node; refuse one that contains itself or does not fit its tag."""
        try:
            # only deep construction finds a node that contains itself
            return super().construct_object(node, deep=True)
        except (ValueError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            shown = f"`{node.value:.20}`" if isinstance(node.value, str) else "this"
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown} cannot be read as {kind}", node.start_mark
            ) from error

    def scan_to_next_token(self) -> None:
        """Skip what is between tokens: blanks, and tabs that are not indentation."""
        super().scan_to_next_token()
        while self.peek() == "\t" and self._tabs_only_separate():
            while self.peek() == "\t":
                self.forward()
            super().scan_to_next_token()

    def _tabs_only_separate(self) -> bool:
        line = self.buffer[self.pointer - self.column :].partition("\n")[0]
        indents = not line[: self.column].strip()
        rest = line[self.column :].strip()
        return bool(self.flow_level) or not indents or not rest or rest.startswith("#")

    def construct_unquoted(self, node: yaml.ScalarNode) -> UnquotedScalar:
        construct = yaml.SafeLoader.yaml_constructors[node.tag]
        return UnquotedScalar(value=construct(self, node), spelling=node.value)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes every text that our loader would not read as text."""

    yaml_implicit_resolvers = _RESOLVERS


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
for _kind in ("bool", "int", "float", "null"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_unquoted)


def byte_order_mark(data: bytes) -> tuple[bytes, str]:
    """Return the byte order mark at the beginning of `data` (empty without one) and the encoding.

    Without a mark the encoding is UTF-8.
    """
    marks = (pair for pair in _BYTE_ORDER_MARKS if data.startswith(pair[0]))
    return next(marks, (b"", "utf-8"))


def decode_text(data: bytes) -> str:
    """Return the text of a file: UTF-8, or the Unicode encoding of its byte order mark.

    Raises:
        ValueError: it is not text; the message has the remedy.
    """
    mark, encoding = byte_order_mark(data)
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start + 1
        raise ValueError(f"byte {place} is not {encoding}: save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it holds zero bytes, as UTF-16 without a mark does: save it as UTF-8")
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a file, as `parse_yaml` returns them.

    Raises:
        ConfigError: it cannot be read, is not YAML, or does not hold keys and values.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        raw = parse_yaml(data, str(path))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); check its path and its permissions"
        ) from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: got a {type(raw).__name__}, need keys and values, one `key: value` a line"
        )
    return raw


def parse_yaml(data: bytes, where: str) -> Any:
    """Return the value of a YAML text.

    Keys are texts; booleans, numbers and null without quotes are `UnquotedScalar`.

    Args:
        data: the text, encoded.
        where: its file or option, for errors.

    Raises:
        ConfigError: it is not YAML; the message names the line.
    """
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"{where}: is longer than {_MAX_BYTES >> 10} KiB, which no configuration is; give the "
            "configuration"
        )
    try:
        text = decode_text(data)
    except ValueError as error:
        raise ConfigError(f"{where}: is not YAML ({error})") from error
    if text.count(":") > _MAX_VALUES // 2:
        # each key has one: found at once, where reading so many takes a second
        raise ConfigError(
            f"{where}: has more than {_MAX_VALUES // 2:,} keys, which no configuration has; give "
            "the configuration"
        )
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ConfigError(f"{where}: is not YAML (it is nested too deeply); correct it") from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid"
        mark = getattr(error, "problem_mark", None)
        lines = re.split(r"\r\n|\r|\n", text)
        if mark and "\t" in lines[mark.line]:
            raise ConfigError(
                f"{where}: line {mark.line + 1} is not YAML (a tab, where YAML takes blanks only); "
                "indent it with blanks"
            ) from error
        line = f" line {mark.line + 1}" if mark and len(lines) > 1 else ""
        raise ConfigError(f"{where}:{line} is not YAML ({problem}); correct it") from error


def write_yaml(raw: Mapping[str, Any]) -> str:
    """Return YAML text that reads back as `raw`."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
