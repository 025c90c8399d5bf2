"""Quotes in CSV: where a field begins with one, it ends with one; elsewhere they are text.

Readers of CSV are lenient: after a stray quote they take the rows that follow for one field, and
of `"Hi" he said` they drop the quotes. Both change what is trained, so both are refused.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedllm.errors import DataError

_LINE_ENDS = re.compile(r"[\r\n]+")
# up to the first quote that is not one of two
_QUOTED = re.compile(r'[^"]*+(?:""[^"]*+)*+')


def checked_quotes(chunks: Iterable[str], file: Path, delimiter: str) -> Iterator[str]:
    """Yield the pieces of a text as they are; fields may lie across pieces.

    Raises:
        DataError: a field in quotes goes on behind its closing quote, or the text ends within it
            (with the row where the field begins).
    """
    quotes = _Quotes(file, delimiter)
    for chunk in chunks:
        quotes.feed(chunk)
        yield chunk
    quotes.end()


class _Quotes:
    """Follows a text from field to field."""

    def __init__(self, file: Path, delimiter: str) -> None:
        self._file = file
        # the quote comes first because a search for one character is fast
        self._opening = re.compile(f'"(?<=[{delimiter}\\r\\n]")')
        self._behind = delimiter + "\r\n"
        self._quoted = False
        self._row = 1
        # the last character, and behind it a quote whose meaning the next piece tells
        self._held = "\n"

    def feed(self, chunk: str) -> None:
        """Go on with a piece of the text."""
        text, at = self._held + chunk, 1
        while at < len(text):
            if self._quoted:
                match = _QUOTED.match(text, at)
                assert match is not None
                at = match.end()
                if at + 1 >= len(text):
                    break
                if text[at + 1] not in self._behind:
                    raise self._refusal("goes on behind its closing quote")
                self._quoted = False
                at += 1
            else:
                found = self._opening.search(text, at)
                end = found.start() if found else len(text)
                self._count_rows(text, at, end)
                self._quoted = found is not None
                at = found.end() if found else end
        self._held = text[at - 1 :]

    def end(self) -> None:
        """Refuse a field that the end of the text cuts."""
        if self._quoted and self._held[1:] != '"':
            raise self._refusal("is not closed")

    def _count_rows(self, text: str, start: int, end: int) -> None:
        ends = len(_LINE_ENDS.findall(text, start, end))
        # blank lines are no rows
        goes_on = ends > 0 and text[start - 1] in "\r\n" and text[start] in "\r\n"
        self._row += ends - goes_on

    def _refusal(self, what: str) -> DataError:
        return DataError(
            f'data.path: {self._file} row {self._row:,} has a field that begins with a quote (") '
            f'and {what}; put the field in quotes, and write a quote within it twice ("")'
        )
