"""Quotes in CSV: a field that begins with a quote ends with one; other quotes are text.

Readers of CSV are lenient: after a stray quote they read the following rows as one field, and they
drop the quotes of `"Hi" he said`. Both change what is trained, so both are refused.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedllm.errors import DataError

_LINE_ENDS = re.compile(r"[\r\n]+")
# all text before the first single quote; two quotes stand for a quote within the field
_QUOTED = re.compile(r'[^"]*+(?:""[^"]*+)*+')


def checked_quotes(chunks: Iterable[str], file: Path, delimiter: str) -> Iterator[str]:
    """Yield the pieces of a text unchanged; a field may extend over several pieces.

    Raises:
        DataError: a field in quotes goes on after its closing quote, or the text ends within it
            (with the row where the field begins).
    """
    quotes = _QuoteChecker(file, delimiter)
    for chunk in chunks:
        quotes.feed(chunk)
        yield chunk
    quotes.end()


class _QuoteChecker:
    """Checker of quotes that follows a text from field to field."""

    def __init__(self, file: Path, delimiter: str) -> None:
        self._file = file
        # the quote comes first because a search for one character is fast
        self._opening = re.compile(f'"(?<=[{delimiter}\\r\\n]")')
        self._after_quote = delimiter + "\r\n"
        self._quoted = False
        self._row = 1
        # the last character, and after it a quote whose meaning depends on the next piece
        self._unread = "\n"

    def feed(self, chunk: str) -> None:
        """Check the next piece of the text."""
        text, at = self._unread + chunk, 1
        while at < len(text):
            if self._quoted:
                match = _QUOTED.match(text, at)
                assert match is not None
                at = match.end()
                if at + 1 >= len(text):
                    break
                if text[at + 1] not in self._after_quote:
                    raise self._refusal("goes on after its closing quote")
                self._quoted = False
                at += 1
            else:
                found = self._opening.search(text, at)
                end = found.start() if found else len(text)
                self._count_rows(text, at, end)
                self._quoted = found is not None
                at = found.end() if found else end
        self._unread = text[at - 1 :]

    def end(self) -> None:
        """Raise an error if the text ends within a field."""
        if self._quoted and self._unread[1:] != '"':
            raise self._refusal("is not closed")

    def _count_rows(self, text: str, start: int, end: int) -> None:
        ends = len(_LINE_ENDS.findall(text, start, end))
        # blank lines are not rows
        goes_on = ends > 0 and text[start - 1] in "\r\n" and text[start] in "\r\n"
        self._row += ends - goes_on

    def _refusal(self, what: str) -> DataError:
        return DataError(
            f'data.path: {self._file} row {self._row:,} has a field that begins with a quote (") '
            f'and {what}; put the field in quotes, and write a quote within it twice ("")'
        )
