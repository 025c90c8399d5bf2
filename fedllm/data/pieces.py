"""Tokens of texts: of whole texts, and of pieces as they are inside a text."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

# characters at the end of a head that are tokenised again together with the rest, and how many
# tokens at both ends of them may depend on the text around
_WINDOW = 256
_EDGE = 8


class TextTokenizer:
    """Tokenizer of batches of texts; the tokens of a text do not depend on the others.

    `special_prefix` are the special tokens that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_prefix = _special_prefix(tokenizer)
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # a tokenizer's file may turn on all three
            self._backend.no_truncation()
            self._backend.no_padding()
            if getattr(self._backend.model, "dropout", None):
                self._backend.model.dropout = None
        self._context = self._line_break() if self._prefixes_space() else []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of every text, without special tokens around it."""
        if not texts:
            return []
        if self._backend is None:
            tokens = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return [list(ids) for ids in tokens]
        encode = self._backend.encode_batch_fast
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    def encode_with_heads(self, heads: Sequence[str], rests: Sequence[str]) -> list[list[int]]:
        """Return the tokens of every head and its rest as one text; equal heads are encoded once.

        The end of a head, its window, is encoded as part of the head, alone, and with the rest. If
        all three agree about the tokens in the middle of the window, the tokens before are taken
        from the head and the tokens after from the rest. Else the whole text is encoded.
        """
        windows = {head: head[-_WINDOW:] for head in dict.fromkeys(heads)}
        whole_heads = dict(zip(windows, self.encode(list(windows)), strict=True))
        alone = dict(zip(windows, self.encode(list(windows.values())), strict=True))
        pairs = list(zip(heads, rests, strict=True))
        followed = self.encode([windows[head] + rest for head, rest in pairs])
        spliced = [
            # a head that is shorter than a window was encoded whole, with its rest
            tokens if head == windows[head] else _splice(whole_heads[head], alone[head], tokens)
            for head, tokens in zip(heads, followed, strict=True)
        ]
        missing = [n for n, tokens in enumerate(spliced) if tokens is None]
        whole_texts = self.encode(["".join(pairs[n]) for n in missing])
        for n, tokens in zip(missing, whole_texts, strict=True):
            spliced[n] = tokens
        return [tokens for tokens in spliced if tokens is not None]

    def encode_inside(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens that every text has when it follows another text."""
        if not self._context:
            return self.encode(texts)
        size = len(self._context)
        with_context = self.encode([f"\n{text}" for text in texts])
        return [
            ids[size:] if ids[:size] == self._context else self.encode([text])[0]
            for ids, text in zip(with_context, texts, strict=True)
        ]

    def tokens_before(self, text: str, characters: Sequence[int]) -> list[int]:
        """Return, for each of these characters, how many tokens of a text begin before it."""
        if self._backend is None:
            return [len(ids) for ids in self.encode([text[:place] for place in characters])]
        encoding = self._backend.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        return [bisect_left(starts, place) for place in characters]

    def characters_before(self, texts: Sequence[str], numbers: Sequence[int]) -> list[int]:
        """Return, for each text, how many characters come before its last `numbers` tokens.

        For a tokenizer that does not return the places of tokens, all tokens of a text count as
        equally long.
        """
        if self._backend is None:
            counts = [len(ids) for ids in self.encode(texts)]
            return [
                len(text) * max(0, count - number) // max(1, count)
                for text, number, count in zip(texts, numbers, counts, strict=True)
            ]
        encode = self._backend.encode_batch
        offsets = [encoding.offsets for encoding in encode(texts, add_special_tokens=False)]
        return [
            places[-number][0] if number < len(places) else 0
            for places, number in zip(offsets, numbers, strict=True)
        ]

    def _line_break(self) -> list[int]:
        return self.encode(["\n"])[0]

    def _prefixes_space(self) -> bool:
        """Return whether the tokenizer puts a space before a text, as SentencePiece does.

        If it does, pieces from inside a text are tokenised after a line break, without that space.
        """
        alone, after_break = self.encode(["a", "\na"])
        return after_break != [*self._line_break(), *alone]


def _splice(head: list[int], window: list[int], followed: list[int]) -> list[int] | None:
    """Return the tokens of a head and its rest; None if the window's tokens do not agree.

    Args:
        head: the tokens of the whole head.
        window: the tokens of the head's window alone.
        followed: the tokens of the window and the rest.
    """
    if len(window) < 3 * _EDGE or len(head) < len(window):
        return None
    num_shared = len(window) - _EDGE
    if head[-num_shared:] != window[_EDGE:] or followed[:num_shared] != window[:num_shared]:
        return None
    return head[:-_EDGE] + followed[num_shared:]


def _special_prefix(tokenizer: Any) -> list[int]:
    plain: list[int] = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    at = next((n for n in starts if whole[n : n + len(plain)] == plain), 0)
    return whole[:at]
