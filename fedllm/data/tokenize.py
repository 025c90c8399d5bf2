"""From rows to tokens, with what does not fit cut where it hurts least.

A prompt is defined as the tokens of three pieces, one after the other: what stands before the
input (the template with its instruction), the input, and what stands after it (up to and with the
response marker). Training, evaluation and `inspect` all use these tokens, so nothing depends on
merges across a border; and an instruction that a thousand rows share is tokenised once.

Where a row has more than `cutoff_tokens` tokens, they go to the response marker first, then to
the answer, to the instruction and to the input: the input is cut before anything else, at its
end. Input and instruction are looked at up to `cutoff_tokens * 16` characters only: a token of
text has about four, and a single row may have hundreds of thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.data.prompts import TEMPLATES, Frame
from fedllm.data.turns import Turn
from fedllm.errors import DataError, ModelError

_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """A row as its owner wrote it; the first reference is the answer to train.

    A conversation has `turns`, up to and with its last assistant turn, and neither instruction
    nor input; an ordinary row has no turns.
    """

    instruction: str
    input: str
    references: Sequence[str]
    turns: tuple[Turn, ...] = ()

    @property
    def answer(self) -> str:
        """The answer to train, empty where there is none."""
        return self.references[0] if self.references else ""


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row's tokens; `answer_ids` ends with the end of sequence unless it was cut.

    A row without answer tokens has no `answer_ids` at all: there is nothing to train or score.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_cut: bool = False
    answer_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class _FrameTokens:
    head: list[int]
    tail: list[int]


class RowEncoder:
    """Turns rows into tokens by one template and one tokenizer.

    Raises:
        DataError: the tokenizer cannot serve the template, or `cutoff_tokens` is too small for it.
        ModelError: the tokenizer has no end of sequence.
    """

    def __init__(self, tokenizer: Any, *, template: str, cutoff_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "model.path: its tokenizer has no end-of-sequence token, so answers could not end; "
                "set eos_token in tokenizer_config.json"
            )
        self._pieces = _Pieces(tokenizer)
        self._tokenizer = tokenizer
        self._template = TEMPLATES[template]
        self._cutoff = cutoff_tokens
        self._most_characters = cutoff_tokens * _CHARACTERS_PER_TOKEN
        self._end: int = tokenizer.eos_token_id
        self._begin = _beginning(tokenizer)
        self._check_cutoff()

    @property
    def fits_16_bits(self) -> bool:
        """Say whether every token of the vocabulary fits 16 bits."""
        return len(self._tokenizer) <= 2**16

    def encode(self, rows: Sequence[TextRow]) -> list[EncodedRow]:
        """Return the tokens of every row, in their order."""
        frames = self._frames(rows)
        inputs = self._pieces.encode([row.input[: self._most_characters] for row in rows])
        answers = self._pieces.encode([row.answer for row in rows])
        return [
            self._fit(frames[row.instruction, bool(row.input)], input_ids, answer_ids)
            for row, input_ids, answer_ids in zip(rows, inputs, answers, strict=True)
        ]

    def prompt(self, row: TextRow) -> str:
        """Return the text of a row's prompt before anything is cut."""
        frame = self._template(self._tokenizer, row.instruction, bool(row.input))
        return frame.head + row.input + frame.tail

    def _frames(self, rows: Sequence[TextRow]) -> dict[tuple[str, bool], _FrameTokens]:
        """Tokenise each distinct frame of some rows once."""
        keys = list(dict.fromkeys((row.instruction, bool(row.input)) for row in rows))
        frames = [self._frame(instruction, has_input) for instruction, has_input in keys]
        heads = self._pieces.encode([frame.head for frame in frames], begins_text=True)
        distinct_tails = list(dict.fromkeys(frame.tail for frame in frames))
        tails = dict(zip(distinct_tails, self._pieces.encode(distinct_tails), strict=True))
        return {
            key: _FrameTokens(
                head=head if frame.begins_sequence else self._begin + head, tail=tails[frame.tail]
            )
            for key, frame, head in zip(keys, frames, heads, strict=True)
        }

    def _frame(self, instruction: str, has_input: bool) -> Frame:
        return self._template(self._tokenizer, instruction[: self._most_characters], has_input)

    def _fit(self, frame: _FrameTokens, input_ids: list[int], answer_ids: list[int]) -> EncodedRow:
        if not answer_ids:
            return EncodedRow(prompt_ids=[], answer_ids=[])
        room = self._cutoff - len(frame.tail)
        answer = [*answer_ids, self._end][:room]
        room -= len(answer)
        head = frame.head[:room]
        kept = input_ids[: room - len(head)]
        return EncodedRow(
            prompt_ids=head + kept + frame.tail,
            answer_ids=answer,
            prompt_cut=len(head) + len(kept) < len(frame.head) + len(input_ids),
            answer_cut=len(answer) <= len(answer_ids),
        )

    def _check_cutoff(self) -> None:
        frame = self._template(self._tokenizer, "", True)
        marker = len(self._pieces.encode([frame.tail])[0])
        if self._cutoff < marker + 2:
            raise DataError(
                f"data.cutoff_tokens: got {self._cutoff}, the response marker alone takes {marker};"
                f" need at least {marker + 2}, sensibly some hundred"
            )


class _Pieces:
    """Tokenises pieces of a text, as they are inside of it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # a tokenizer file may ask for both
            self._backend.no_truncation()
            self._backend.no_padding()
        self._context = self._line_break() if self._marks_beginnings() else []

    def encode(self, texts: Sequence[str], *, begins_text: bool = False) -> list[list[int]]:
        """Return the tokens of every piece, without special tokens around it."""
        if begins_text or not self._context:
            return self._plain(texts)
        size = len(self._context)
        found = self._plain([f"\n{text}" for text in texts])
        if all(ids[:size] == self._context for ids in found):
            return [ids[size:] for ids in found]
        return self._plain(texts)

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            found = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return [list(ids) for ids in found]
        encode = self._backend.encode_batch_fast
        return [found.ids for found in encode(texts, add_special_tokens=False)]

    def _line_break(self) -> list[int]:
        return self._plain(["\n"])[0]

    def _marks_beginnings(self) -> bool:
        """Say whether a text's beginning gets a space, as SentencePiece does.

        Our pieces follow a line break: tokenised behind one, they do without.
        """
        alone, behind = self._plain(["a", "\na"])
        return behind != [*self._line_break(), *alone]


def _beginning(tokenizer: Any) -> list[int]:
    """Return the special tokens that this tokenizer puts before a text."""
    begin = tokenizer.bos_token_id
    around = list(tokenizer("")["input_ids"])
    return [begin] if begin is not None and around[:1] == [begin] else []
