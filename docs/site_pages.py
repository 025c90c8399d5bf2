"""Pages of the site that the repository does not hold: a page per method, keys with anchors.

Where a page of the repository has a table that follows from the code, the site has entries that a
link and the search can find.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from pygments.lexers.data import JsonLexer

from docs import reference
from fedllm.cli.main import app
from fedllm.config.reference import MAY_GROW, REQUIRED, KeyEntry, key_entries
from fedllm.methods.catalog import METHODS

_REDIRECT = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={0}">'
_SOURCE_OF_METHOD = re.compile(r"\]\(\.\./fedllm/methods/\w+/(\w+)\.py\)")


def setup(sphinx: Any) -> Mapping[str, bool]:
    """Connect the site's own pages to the steps of Sphinx."""
    sphinx.add_lexer("jsonl", JsonLexer)
    sphinx.connect("autodoc-process-docstring", escape_docstring)
    sphinx.connect("builder-inited", write_method_pages)
    sphinx.connect("source-read", complete_page)
    sphinx.connect("build-finished", write_redirect)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_method_pages(sphinx: Any) -> None:
    """Write a page for every method, if it is another than before."""
    folder = Path(sphinx.confdir) / "methods"
    folder.mkdir(exist_ok=True)
    for stale in set(folder.glob("*.md")) - {folder / f"{name}.md" for name in METHODS}:
        stale.unlink()
    for name in METHODS:
        path, text = folder / f"{name}.md", reference.method_page(name)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def complete_page(_sphinx: Any, page: str, source: list[str]) -> None:
    """Put entries in the place of a page's tables, and pages of methods in that of their files."""
    parts: Mapping[str, Callable[[str], str]] = {"keys": _keys, "commands": _commands}
    for kind, part in parts.items():
        pattern = re.compile(rf"<!-- {kind}(?:: (\S+))? -->\n.*?<!-- end -->", re.DOTALL)
        source[0] = pattern.sub(lambda found, part=part: part(found[1]), source[0])  # type: ignore[misc]
    if page == "docs/methods":
        source[0] = _SOURCE_OF_METHOD.sub(r"](methods/\1.md)", source[0])


def escape_docstring(*event: Any) -> None:
    """Keep what is no markup in a docstring as it is: norms, and the tree of errors."""
    lines = event[-1]
    tree = [number for number, line in enumerate(lines) if line.startswith(("├", "└"))]
    if tree:
        span = slice(tree[0] - 1, tree[-1] + 1)
        lines[span] = ["::", "", *(f"    {line}" for line in lines[span]), ""]
    else:
        lines[:] = [line.replace("|", "\\|") for line in lines]


def write_redirect(sphinx: Any, error: Exception | None) -> None:
    """Let the site's folder begin with its first page."""
    if error is None and sphinx.builder.format == "html":
        target = sphinx.builder.get_target_uri(sphinx.config.root_doc)
        index = Path(sphinx.outdir) / "index.html"
        index.write_text(_REDIRECT.format(target), encoding="utf-8")


def _keys(section: str) -> str:
    return "\n\n".join(
        _entry(each) for each in key_entries() if reference.section_of(each.name) == section
    )


def _entry(entry: KeyEntry) -> str:
    default = f"default {reference.default_of(entry)}"
    facts = [
        reference.type_of(entry),
        reference.default_of(entry) if entry.default == REQUIRED else default,
        entry.kind if entry.kind == MAY_GROW else f"{entry.kind} key",
    ]
    return f"````{{confval}} {entry.name}\n\n{' · '.join(facts)}\n\n{entry.meaning}\n````"


def _commands(_name: str) -> str:
    group = typer.main.get_group(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = f"fedllm {name} [OPTIONS] {reference.arguments(name, command)}".rstrip()
    parameters = list(_parameters(command, context))
    parts = [f"### {name}", f"```\n{usage}\n```", (command.help or "").strip()]
    if parameters:
        parts.append(reference.table(("", ""), parameters).rstrip())
    return "\n\n".join(parts)


def _parameters(command: Any, context: Any) -> Iterator[tuple[str, str]]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and "--help" not in record[0]:
            yield f"`{record[0].strip()}`", record[1].replace("<", "\\<")
