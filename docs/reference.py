"""Writes what pages and the editors' schema take from the code: `make reference`.

A part of a page between `<!-- keys: model -->` and `<!-- end -->` is a table of the configuration's
keys below `model`; `-` are those outside sections. Others are tables of methods and their options.
"""

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from fedllm.cli.main import app
from fedllm.config.reference import REQUIRED, KeyEntry, key_entries, option_entries
from fedllm.config.schema import config_schema
from fedllm.methods.catalog import KEY_CHOICES, METHODS, MethodEntry
from fedllm.methods.options import LOCAL_OPTIONS, OPTIONS, SERVER_OPTIONS
from fedllm.storage.paths import shipped

DOCS = Path(__file__).parent
PAGES = (DOCS / "configuration.md", DOCS / "methods.md", DOCS / "commands.md")
SCHEMA = shipped("configs/schema.json")
_PART = re.compile(r"(<!-- ([a-z ]+)(?:: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)
# of a docstring's formulae: pattern, and what it is in Markdown
_FORMULAE = (
    (r"https://[^\s,:)]+", r"<\g<0>>"),
    (r"<-", "←"),
    (r">=", "≥"),
    (r"<=", "≤"),
    (r"\bdW", "ΔW"),
    (r"\blambda\b", "λ"),
    (r"\bgamma\b", "\N{GREEK SMALL LETTER GAMMA}"),
    (r"\bsum(?=_)", "Σ"),
    (r"\b(sqrt)\(", "√("),
    (r"\^(-?\w)", r"<sup>\1</sup>"),
    (r"(?<=[A-Z])'", "\N{PRIME}"),
    (r"(?<![\w/])([A-Za-zΣΔ]{1,2})_\{([^}]+)\}", r"\1<sub>\2</sub>"),
    (r"(?<![\w/])([A-Za-zΣΔ]{1,2})_(\w+)", r"\1<sub>\2</sub>"),
    (r"(?<=>)([a-z])_(?=\w)", r"\1"),
)
_OPTIONS: Mapping[str, tuple[str, str, Mapping[str, type[BaseModel]]]] = {
    "options": ("`method.name`", "`method.options`", OPTIONS),
    "server options": ("`method.server`", "`method.server_options`", SERVER_OPTIONS),
    "local options": ("`method.local`", "`method.local_options`", LOCAL_OPTIONS),
}


def written(page: str) -> str:
    """Return a page with its tables as the code has them."""
    return _PART.sub(lambda found: f"{found[1]}{_part(found[2], found[3])}{found[4]}", page)


def schema_text() -> str:
    """Return the shipped schema's file."""
    return json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"


def method_page(name: str) -> str:
    """Return the page of a method: its catalogue entry, its module's docstring, its options."""
    entry = METHODS[name]
    facts = [
        ("Paper", f"<{entry.paper}>"),
        ("Ranks", "any mix" if entry.ranks == "any" else "one for all clients"),
        ("Base", "stays as it is" if entry.base == "stays" else "changes every round"),
        ("Clients keep between rounds", entry.client_state),
        ("A client sends", entry.bytes_up),
        ("A client receives", entry.bytes_down),
        ("Private clients", f"yes, {entry.private}" if entry.private else "no"),
    ]
    headline, _, text = _docstring(entry).partition("\n")
    parts = [
        f"# {name}",
        _typeset(headline),
        table(("", ""), facts).rstrip(),
        f"```yaml\nmethod: {{name: {name}}}\n```",
        f"## What it computes\n\n{_typeset(text.strip())}",
    ]
    if name in OPTIONS:
        parts.append(f"## Options\n\n{_options_table({name: OPTIONS[name]}, 'options').rstrip()}")
    parts.append(
        "[All methods in a table, and what they share](../methods.md) · "
        "[a method of your own](../own-method.md)"
    )
    return "\n\n".join(parts) + "\n"


def _docstring(entry: MethodEntry) -> str:
    """Return the docstring of a method's file, without the legend of its tensors' names."""
    module = importlib.import_module(entry.path.partition(":")[0])
    return (module.__doc__ or "").partition("\n\nLegend:")[0].strip()


def _typeset(text: str) -> str:
    """Return a docstring as Markdown: what a source file spells out is set as formulae."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):  # what is not between backticks
        for pattern, replacement in _FORMULAE:
            parts[number] = re.sub(pattern, replacement, parts[number])
    return "`".join(parts)


def _part(kind: str, name: str) -> str:
    if kind == "keys":
        return _keys_table(each for each in key_entries() if section_of(each.name) == name)
    if kind == "methods":
        return _methods_table()
    if kind == "commands":
        return _commands_table()
    return _options_table(_OPTIONS[kind][2], kind)


def section_of(key: str) -> str:
    """Return the section that a key is in; `-` is none."""
    return key.partition(".")[0] if "." in key else "-"


def _keys_table(entries: Iterable[KeyEntry]) -> str:
    rows = [
        (f"`{each.name}`", type_of(each), default_of(each), each.kind, each.meaning)
        for each in entries
    ]
    assert rows, "no such section"
    return table(("Key", "Type", "Default", "Kind", "Meaning"), rows)


def default_of(entry: KeyEntry) -> str:
    """Return the default of a key, as Markdown."""
    return entry.default if entry.default == REQUIRED else f"`{entry.default}`"


def type_of(entry: KeyEntry) -> str:
    """Return what the value of a key may be, as Markdown."""
    words = KEY_CHOICES.get(entry.name)
    if not words:
        return entry.type
    own = " or `package.module:Class`" if entry.name == "method.name" else ""
    return ", ".join(f"`{word}`" for word in words) + own


def _options_table(classes: Mapping[str, type[BaseModel]], kind: str) -> str:
    owner, option, _ = _OPTIONS[kind]
    rows = [
        (f"`{name}`", f"`{each.name}`", f"`{each.default}`", each.type, each.meaning)
        for name, options in classes.items()
        for each in option_entries(options)
    ]
    return table((owner, option, "Default", "Values", "Meaning"), rows)


def _methods_table() -> str:
    rows = [
        (
            f"[`{name}`]({_source(entry)})",
            entry.ranks,
            entry.base,
            entry.client_state,
            f"{entry.bytes_up}, {entry.bytes_down}",
            entry.summary,
            f"[{_short(entry.paper)}]({entry.paper})",
        )
        for name, entry in METHODS.items()
    ]
    header = ("Name", "Ranks", "Base", "Client state", "Bytes up, down", "In a line", "Paper")
    return table(header, rows)


def _commands_table() -> str:
    commands: Mapping[str, Any] = typer.main.get_group(app).commands
    rows = [
        (f"`fedllm {name} {arguments(name, command)}`".replace(" `", "`"), _first_line(command))
        for name, command in commands.items()
    ]
    return table(("Command", "Does"), rows)


def arguments(name: str, command: Any) -> str:
    """Return the arguments of a command, without its options."""
    pieces = command.collect_usage_pieces(command.make_context(name, [], resilient_parsing=True))
    words = [piece.translate({ord(brace): None for brace in "{}"}) for piece in pieces]
    return " ".join(word.replace("......", "...") for word in words if word != "[OPTIONS]")


def _first_line(command: Any) -> str:
    return str(command.help or "").partition("\n\n")[0].replace("\n", " ")


def _source(entry: MethodEntry) -> str:
    return f"../{entry.path.partition(':')[0].replace('.', '/')}.py"


def _short(paper: str) -> str:
    return paper.removeprefix("https://").removeprefix("arxiv.org/abs/")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"{line}\n" for line in _lines(header, rows))


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def main() -> None:
    """Write the pages' tables and the schema."""
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
