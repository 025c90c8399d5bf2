"""Clients that failed for the same reason, in one line."""

import re
from collections.abc import Mapping

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NAMED = 3


def same_reasons(failed: Mapping[str, str]) -> dict[str, list[str]]:
    """Return reason -> the clients that failed for it, the most frequent reason first.

    Reasons that differ in numbers only, or in the client that they name, count as the same; the
    first of them is kept.
    """
    clients: dict[str, list[str]] = {}
    kept: dict[str, str] = {}
    for client, reason in failed.items():
        key = _NUMBER.sub("N", reason.replace(client, "CLIENT"))
        clients.setdefault(kept.setdefault(key, reason), []).append(client)
    return dict(sorted(clients.items(), key=lambda item: -len(item[1])))


def reason_line(reason: str, clients: list[str]) -> str:
    """Return a line: `12 clients (a, b, c, ...): reason`."""
    if len(clients) == 1:
        return f"{clients[0]}: {reason}"
    more = ", ..." if len(clients) > _NAMED else ""
    return f"{len(clients)} clients ({', '.join(clients[:_NAMED])}{more}): {reason}"
