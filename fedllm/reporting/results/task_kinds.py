"""Kinds of tasks: the twelve categories that FlexLoRA holds out, grouped by what they ask for.

The categories are those of Natural Instructions; the grouping is our own.
"""

import re
from collections.abc import Iterable, Mapping

KINDS: Mapping[str, tuple[str, ...]] = {
    "logical relation": (
        "Textual Entailment",
        "Cause Effect Classification",
        "Coreference Resolution",
        "Dialogue Act Recognition",
        "Answerability Classification",
        "Word Analogy",
    ),
    "extraction": ("Overlap Extraction", "Keyword Tagging"),
    "generation": (
        "Question Rewriting",
        "Title Generation",
        "Data to Text",
        "Grammar Error Correction",
    ),
}


def kind_of(category: str) -> str | None:
    """Return the kind of a category, however its name is written; None: it has none."""
    return _KIND_OF.get(_plain(category))


def kinds_of(categories: Mapping[str, str], clients: Iterable[str]) -> dict[str, list[str]]:
    """Return kind -> those of the clients whose category has it, in the order of `KINDS`."""
    members: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for client in clients:
        kind = kind_of(categories.get(client, ""))
        if kind:
            members[kind].append(client)
    return {kind: found for kind, found in members.items() if found}


def _plain(category: str) -> str:
    return re.sub(r"[^a-z0-9]", "", category.lower())


_KIND_OF = {_plain(name): kind for kind, names in KINDS.items() for name in names}
