"""Texts as tokens: whole ones, and pieces of one as they are inside of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# characters at the end of a head that are tokenised again with what follows, and how many tokens
# at either end of them may depend on what stands around
_WINDOW = 256
_EDGE = 8


@dataclass(frozen=True, kw_only=True)
class PlacedTokens:
    """The tokens of a text, and the characters [start, stop) that each stands for."""

    ids: list[int]
    places: list[tuple[int, int]]


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

    def placed(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """Return the same tokens as `encode` with their places in the text."""
        if self._backend is None:
            return [self._placed_slowly(text) for text in texts]
        encode = self._backend.encode_batch
        return [
            PlacedTokens(ids=found.ids, places=found.offsets)
            for found in encode(texts, add_special_tokens=False)
        ]

    def _placed_slowly(self, text: str) -> PlacedTokens:
        """Find places by halving: a token ends where the text up to there has it."""
        ids = self.encode([text])[0]
        ends = [0]
        for number in range(1, len(ids) + 1):
            low, high = ends[-1], len(text)
            while low < high:
                middle = (low + high) // 2
                if len(self.encode([text[:middle]])[0]) >= number:
                    high = middle
                else:
                    low = middle + 1
            ends.append(low)
        return PlacedTokens(ids=ids, places=list(pairwise(ends)))

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
