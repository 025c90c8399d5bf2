"""From rows to tokens, with what does not fit cut where it hurts least.

A row that fits is tokenised as one text, prompt and answer together, so that it has the tokens
that a server and every other trainer see. A prompt has the tokens that it has alone, because that
is all that a server sends: where the beginning of an answer would merge with the prompt's end,
the answer is tokenised by itself.

Where a row has more than `cutoff_tokens` tokens, they go to the response marker first, then to
the answer, to the instruction and to the input: the input is cut before anything else, at its
end; a conversation loses its oldest turns before that. Input and instruction are looked at up to
`cutoff_tokens * 16` characters only: a token of text has about four, and a single row may have
hundreds of thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedllm.data.cache import AnswerForm
from fedllm.data.pieces import Pieces
from fedllm.data.prompts import TEMPLATES, Script
from fedllm.data.turns import TextRow
from fedllm.errors import DataError, ModelError

_CHARACTERS_PER_TOKEN = 16
# characters before the end of a text that are read to find where to cut it, at least
_WINDOW = 256
# a shorter instruction is not worth being read once for all its rows
_LEAST_SHARED = 512
# tokens before the answer that have to be those of the marker alone
_WITNESSES = 4


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A row's tokens; `answer_ids` ends with the end of the turn unless it was cut.

    A row without answer tokens has no `answer_ids` at all: there is nothing to train or score.
    `prompt_targets` are the places of the prompt's tokens that the assistant wrote in earlier
    turns.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: Sequence[int] = ()
    prompt_cut: bool = False
    answer_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A row on its way: as much of it as is tried, `kept` of its open text, and its tokens."""

    row: TextRow
    kept: int | None
    cut: bool
    script: Script
    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, kw_only=True)
class _Try:
    """What to write next of a row."""

    row: TextRow
    kept: int | None
    cut: bool


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
        self._pieces = Pieces(tokenizer)
        self._tokenizer = tokenizer
        self._template = TEMPLATES[template](tokenizer)
        self._begin = [] if self._template.begins_sequence else self._pieces.beginning
        self._cutoff = cutoff_tokens
        self._most_characters = cutoff_tokens * _CHARACTERS_PER_TOKEN
        self._eos: int = tokenizer.eos_token_id
        self._ends: set[int] = set()
        self._room_behind(self._pieces.inside([self._template.marker()])[0])

    @property
    def fits_16_bits(self) -> bool:
        """Say whether every token of the vocabulary fits 16 bits."""
        return len(self._tokenizer) <= 2**16

    @property
    def answer_form(self) -> AnswerForm:
        """What stands around the answers of the rows so far."""
        ids = self._pieces.inside(self._template.leads)
        leads = {self._tokenizer.decode(each, skip_special_tokens=True).strip() for each in ids}
        return AnswerForm(ends=tuple(sorted(self._ends)), leads=tuple(sorted(leads - {""})))

    def encode(self, rows: Sequence[TextRow]) -> list[EncodedRow]:
        """Return the tokens of every row, in their order.

        Raises:
            DataError: the template cannot write a row.
        """
        found: dict[int, EncodedRow] = {}
        places = [place for place, row in enumerate(rows) if row.answer]
        tries = [self._first(rows[place]) for place in places]
        while places:
            drafts = dict(zip(places, self._drafts(tries), strict=True))
            for place, draft in drafts.items():
                if not draft.answer_ids or draft.num_tokens <= self._cutoff:
                    found[place] = self._fitting(draft)
                elif draft.kept == 0:
                    found[place] = self._forced(draft)
            places = [place for place in places if place not in found]
            tries = self._shortened([drafts[place] for place in places])
        nothing = EncodedRow(prompt_ids=[], answer_ids=[])
        return [found.get(place, nothing) for place in range(len(rows))]

    def prompt(self, row: TextRow) -> str:
        """Return the text of a row's prompt before anything is cut."""
        return self._template.script(row).prompt

    def _first(self, row: TextRow) -> _Try:
        """Take a row as it is, but for text that could never fit."""
        clipped = len(self._template.open_text(row)) > self._most_characters
        return _Try(row=row, kept=self._most_characters if clipped else None, cut=clipped)

    def _drafts(self, tries: Sequence[_Try]) -> list[_Draft]:
        scripts = [self._template.script(each.row, each.kept) for each in tries]
        parts = self._parts([each.row for each in tries], scripts)
        drafts = []
        for each, script, (prompt, answer) in zip(tries, scripts, parts, strict=True):
            ends = [] if not answer or answer[-1:] == [script.end] else [self._eos]
            drafts.append(
                _Draft(
                    row=each.row,
                    kept=each.kept,
                    cut=each.cut,
                    script=script,
                    prompt_ids=[*self._begin, *prompt],
                    answer_ids=[*answer, *ends],
                )
            )
        return drafts

    def _parts(
        self, rows: Sequence[TextRow], scripts: Sequence[Script]
    ) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of every prompt and of its answer."""
        sizes = [_shared_part(row, script) for row, script in zip(rows, scripts, strict=True)]
        texts = [script.prompt + script.answer for script in scripts]
        wholes = self._pieces.encode_behind(
            [text[:size] for text, size in zip(texts, sizes, strict=True)],
            [text[size:] for text, size in zip(texts, sizes, strict=True)],
        )
        before = [script.marker or script.prompt[-_WINDOW:] for script in scripts]
        distinct = list(dict.fromkeys(before))
        alone = dict(zip(distinct, self._pieces.encode(distinct), strict=True))
        behind = [text + script.answer for text, script in zip(before, scripts, strict=True)]
        tails = self._pieces.encode(behind)
        found = {
            n: _apart(wholes[n], alone[text], tails[n]) if scripts[n].answer else (wholes[n], [])
            for n, text in enumerate(before)
        }
        unsure = [n for n, parts in found.items() if parts is None]
        prompts = self._pieces.encode([scripts[n].prompt for n in unsure])
        for n, prompt in zip(unsure, prompts, strict=True):
            whole = wholes[n]
            same = whole[: len(prompt)] == prompt
            answer = whole[len(prompt) :] if same else self._pieces.inside([scripts[n].answer])[0]
            found[n] = (prompt, answer)
        return [parts for parts in found.values() if parts is not None]

    def _fitting(self, draft: _Draft) -> EncodedRow:
        if not draft.answer_ids:
            return EncodedRow(prompt_ids=[], answer_ids=[])
        self._ends.add(draft.answer_ids[-1])
        return EncodedRow(
            prompt_ids=draft.prompt_ids,
            answer_ids=draft.answer_ids,
            prompt_targets=self._earlier(draft),
            prompt_cut=draft.cut,
        )

    def _earlier(self, draft: _Draft) -> list[int]:
        """Return the places of the prompt's tokens that begin in the assistant's text."""
        spans = self._template.earlier(draft.row, draft.kept) if draft.row.turns else ()
        if not spans:
            return []
        assert not self._begin, "only a template that begins the sequence has such spans"
        borders = [place for span in spans for place in span]
        found = self._pieces.tokens_before(draft.script.prompt, borders)
        pairs = zip(found[::2], found[1::2], strict=True)
        # nothing comes before the first token that could predict it
        return [place for start, stop in pairs for place in range(max(1, start), stop)]

    def _shortened(self, drafts: Sequence[_Draft]) -> list[_Try]:
        """Return what to try of rows that do not fit: without old turns, or with less text."""
        texts = [self._template.open_text(draft.row)[: draft.kept] for draft in drafts]
        overs = [draft.num_tokens - self._cutoff for draft in drafts]
        sizes = [_WINDOW + _CHARACTERS_PER_TOKEN * over for over in overs]
        ends = [text[-size:] for text, size in zip(texts, sizes, strict=True)]
        before = self._pieces.without_last(ends, overs)
        tries = []
        for draft, text, end, place, over in zip(drafts, texts, ends, before, overs, strict=True):
            # a token stands for a byte at least
            rest = self._template.shorter(draft.row, over)
            if rest is not None:
                tries.append(replace(self._first(rest), cut=True))
                continue
            kept = min(len(text) - len(end) + place, len(text) - 1)
            tries.append(_Try(row=draft.row, kept=max(0, kept), cut=draft.cut or bool(text)))
        return tries

    def _forced(self, draft: _Draft) -> EncodedRow:
        """Cut what is left around the open text: the answer last, the marker never."""
        script = draft.script
        marker = self._pieces.inside([script.marker])[0] if script.marker else []
        room = self._room_behind(marker)
        answer = draft.answer_ids[:room]
        room -= len(answer)
        text = script.prompt.removesuffix(script.marker)
        head = [*self._begin, *(self._pieces.encode([text])[0] if text else [])]
        answer_cut = len(answer) < len(draft.answer_ids)
        if not answer_cut:
            self._ends.add(answer[-1])
        return EncodedRow(
            prompt_ids=head[:room] + marker,
            answer_ids=answer,
            prompt_cut=draft.cut or len(head) > room,
            answer_cut=answer_cut,
        )

    def _room_behind(self, marker: Sequence[int]) -> int:
        if self._cutoff < len(marker) + 2:
            raise DataError(
                f"data.cutoff_tokens: got {self._cutoff}, the response marker alone takes "
                f"{len(marker)}; need at least {len(marker) + 2}, sensibly some hundred"
            )
        return self._cutoff - len(marker)


def _apart(
    whole: list[int], before: list[int], tail: list[int]
) -> tuple[list[int], list[int]] | None:
    """Return the tokens of prompt and answer, given those of both and of the prompt's end.

    Behind the prompt's end alone an answer has the tokens that it has behind the whole prompt,
    where both agree about that end: the prompt need not be read once more. None: they do not.

    Args:
        whole: the tokens of prompt and answer.
        before: of the prompt's end.
        tail: of the prompt's end and the answer.
    """
    size = len(tail) - len(before)
    if not before or size <= 0 or tail[: len(before)] != before:
        return None
    prompt, answer = whole[:-size], whole[-size:]
    witnesses = before[-_WITNESSES:]
    agreed = answer == tail[-size:] and prompt[-len(witnesses) :] == witnesses
    return (prompt, answer) if agreed else None


def _shared_part(row: TextRow, script: Script) -> int:
    """Return how many characters of a prompt its row probably shares with others.

    That is up to the end of the instruction. It depends on the row alone, as its tokens have to.
    """
    at = script.prompt.find(row.instruction) if len(row.instruction) >= _LEAST_SHARED else -1
    return 0 if at < 0 else at + len(row.instruction)
