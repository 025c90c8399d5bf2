"""Texts as tokens: whole ones, and pieces of one as they are inside of it."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

# characters at the end of a head that are tokenised again with what follows, and how many tokens
# at either end of them may depend on what stands around
_WINDOW = 256
_EDGE = 8


class Pieces:
    """Tokenises texts; what it returns for one does not depend on the others.

    `beginning` are the special tokens that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.beginning = _beginning(tokenizer)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # a tokenizer file may ask for all three
            self._backend.no_truncation()
            self._backend.no_padding()
            if getattr(self._backend.model, "dropout", None):
                self._backend.model.dropout = None
        self._context = self._line_break() if self._marks_beginnings() else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of every text, without special tokens around it."""
        if not texts:
            return []
        if self._backend is None:
            found = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return [list(ids) for ids in found]
        encode = self._backend.encode_batch_fast
        return [found.ids for found in encode(texts, add_special_tokens=False)]

    def encode_behind(self, heads: Sequence[str], rests: Sequence[str]) -> list[list[int]]:
        """Return the tokens of every head and its rest as one text; equal heads are read once.

        The end of a head is read alone and with the rest. Where all three readings agree about
        the tokens in its middle, those before are the head's and those behind are the rest's;
        else the whole text is read.
        """
        windows = {head: head[-_WINDOW:] for head in dict.fromkeys(heads)}
        whole_heads = dict(zip(windows, self.encode(list(windows)), strict=True))
        alone = dict(zip(windows, self.encode(list(windows.values())), strict=True))
        pairs = list(zip(heads, rests, strict=True))
        followed = self.encode([windows[head] + rest for head, rest in pairs])
        found = [
            # a head that is its window was followed as a whole
            tokens if head == windows[head] else _spliced(whole_heads[head], alone[head], tokens)
            for head, tokens in zip(heads, followed, strict=True)
        ]
        missing = [n for n, tokens in enumerate(found) if tokens is None]
        read = self.encode(["".join(pairs[n]) for n in missing])
        for n, tokens in zip(missing, read, strict=True):
            found[n] = tokens
        return [tokens for tokens in found if tokens is not None]

    def inside(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of every text as one that follows another text."""
        if not self._context:
            return self.encode(texts)
        size = len(self._context)
        found = self.encode([f"\n{text}" for text in texts])
        return [
            ids[size:] if ids[:size] == self._context else self.encode([text])[0]
            for ids, text in zip(found, texts, strict=True)
        ]

    def tokens_before(self, text: str, characters: Sequence[int]) -> list[int]:
        """Return how many tokens of a text begin before each of these characters."""
        if self._backend is None:
            return [len(ids) for ids in self.encode([text[:place] for place in characters])]
        found = self._backend.encode(text, add_special_tokens=False)
        starts = [start for start, _ in found.offsets]
        return [bisect_left(starts, place) for place in characters]

    def without_last(self, texts: Sequence[str], numbers: Sequence[int]) -> list[int]:
        """Return how many characters of each text stand before so many of its last tokens.

        A tokenizer without places is asked for its number of tokens only: its are taken as of
        equal length.
        """
        if self._backend is None:
            counts = [len(ids) for ids in self.encode(texts)]
            return [
                len(text) * max(0, count - number) // max(1, count)
                for text, number, count in zip(texts, numbers, counts, strict=True)
            ]
        encode = self._backend.encode_batch
        offsets = [found.offsets for found in encode(texts, add_special_tokens=False)]
        return [
            places[-number][0] if number < len(places) else 0
            for places, number in zip(offsets, numbers, strict=True)
        ]

    def _line_break(self) -> list[int]:
        return self.encode(["\n"])[0]

    def _marks_beginnings(self) -> bool:
        """Say whether a text's beginning gets a space, as SentencePiece does.

        Pieces from inside a text are tokenised behind a line break: they do without.
        """
        alone, behind = self.encode(["a", "\na"])
        return behind != [*self._line_break(), *alone]


def _spliced(head: list[int], window: list[int], followed: list[int]) -> list[int] | None:
    """Join a head's tokens and those of its window with the rest, where they agree in between."""
    if len(window) < 3 * _EDGE or len(head) < len(window):
        return None
    behind = len(window) - _EDGE
    if head[-behind:] != window[_EDGE:] or followed[:behind] != window[:behind]:
        return None
    return head[:-_EDGE] + followed[behind:]


def _beginning(tokenizer: Any) -> list[int]:
    plain: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    at = next((n for n in starts if whole[n : n + len(plain)] == plain), 0)
    return whole[:at]
