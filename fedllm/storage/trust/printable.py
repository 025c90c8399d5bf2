"""Text of clients, data and models as it may reach a terminal, which must not obey it."""

import re
from typing import Annotated

from pydantic import AfterValidator

MAX_LINE = 1000
# C0 and C1 controls, line separators, and marks that reorder the text around them
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_CONTROLS}]")
_BREAK = re.compile(f"[{_CONTROLS}\\n\\t]")


def printable(text: str) -> str:
    """Return a text of one or more lines with its control characters escaped."""
    return _CONTROL.sub(_escape, text)


def one_line(text: str) -> str:
    """Return a text as one line of bounded length, with line breaks escaped too."""
    short = text if len(text) <= MAX_LINE else f"{text[:MAX_LINE]}..."
    return _BREAK.sub(_escape, short)


Line = Annotated[str, AfterValidator(one_line)]
"""A text in a record that others wrote and people read: one line of bounded length."""


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
