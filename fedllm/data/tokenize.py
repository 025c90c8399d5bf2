"""Rows to tokens; a row that is too long is cut where it loses least.

A row that fits is tokenised as one text, prompt and answer together, so that it has the same
tokens as on a server and in other trainers. A prompt always has the tokens that it has alone,
because a server sends nothing else: if the beginning of the answer would merge with the prompt's
end, the answer is tokenised separately.

A row of more than `cutoff_tokens` tokens is shortened in this order: first a conversation loses
its oldest turns, then the input is cut at its end, then the instruction, then the answer. The
response marker is never cut. Only the first `cutoff_tokens * 16` characters of instruction and
input are read: a token has about four characters, and a row may have hundreds of thousands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedllm.data.cache import AnswerForm
from fedllm.data.pieces import TextTokenizer
from fedllm.data.prompts import TEMPLATES, Script
from fedllm.data.turns import TextRow
from fedllm.errors import DataError, ModelError

_CHARACTERS_PER_TOKEN = 16
# minimum number of characters at the end of a text that are tokenised to find where to cut it
_WINDOW = 256
# minimum length of an instruction, in characters, that is tokenised once for all its rows
_MIN_SHARED = 512
# number of tokens before the answer that have to be the same as those of the marker alone
_CONTEXT_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """Tokens of a row; `answer_ids` ends with the end of the turn unless the answer was cut.

    `answer_ids` is empty if there is nothing to train or score. `prompt_targets` are the places of
    the prompt's tokens that the assistant wrote in earlier turns.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    prompt_targets: Sequence[int] = ()
    prompt_cut: bool = False
    answer_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """Row with its tokens before the check of their number; `kept` as in `_Plan`."""

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
class _Plan:
    """Part of a row to tokenise next: `kept` characters of its open text; None: all."""

    row: TextRow
    kept: int | None
    cut: bool


class RowEncoder:
    """Encoder of rows to tokens, with one template and one tokenizer.

    Raises:
        DataError: the tokenizer does not fit the template, or `cutoff_tokens` is too small for it.
        ModelError: the tokenizer has no end of sequence.
    """

    def __init__(self, tokenizer: Any, *, template: str, cutoff_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "model.path: its tokenizer has no end-of-sequence token, so answers could not end; "
                "set eos_token in tokenizer_config.json"
            )
        self._text_tokenizer = TextTokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._template = TEMPLATES[template](tokenizer)
        self._begin = [] if self._template.begins_sequence else self._text_tokenizer.special_prefix
        self._cutoff = cutoff_tokens
        self._max_characters = cutoff_tokens * _CHARACTERS_PER_TOKEN
        self._eos: int = tokenizer.eos_token_id
        self._ends: set[int] = set()
        self._room_before(self._text_tokenizer.encode_inside([self._template.marker()])[0])

    @property
    def fits_16_bits(self) -> bool:
        """Return whether every token of the vocabulary fits in 16 bits."""
        return len(self._tokenizer) <= 2**16

    @property
    def answer_form(self) -> AnswerForm:
        """The text around the answers of the rows encoded so far."""
        encoded = self._text_tokenizer.encode_inside(self._template.leads)
        leads = {self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in encoded}
        return AnswerForm(ends=tuple(sorted(self._ends)), leads=tuple(sorted(leads - {""})))

    def encode(self, rows: Sequence[TextRow]) -> list[EncodedRow]:
        """Return the tokens of every row, in the order of the rows.

        Raises:
            DataError: the template cannot write a row.
        """
        parts = [self._clipped(row) for row in rows]
        encoded = self._encode(parts)
        # where a part of a huge answer fits, the whole might
        fits = [
            n for n, part in enumerate(parts) if part is not rows[n] and not encoded[n].answer_cut
        ]
        for n, whole in zip(fits, self._encode([rows[n] for n in fits]), strict=True):
            encoded[n] = whole
        return encoded

    def _clipped(self, row: TextRow) -> TextRow:
        """Return a row without the end of an answer that could never fit: it costs memory."""
        if len(row.answer) <= self._max_characters:
            return row
        answer = row.answer[: self._max_characters]
        turns = (*row.turns[:-1], replace(row.turns[-1], content=answer)) if row.turns else ()
        return replace(row, references=[answer, *row.references[1:]], turns=turns)

    def _encode(self, rows: Sequence[TextRow]) -> list[EncodedRow]:
        encoded: dict[int, EncodedRow] = {}
        places = [place for place, row in enumerate(rows) if row.answer]
        plans = [self._first_plan(rows[place]) for place in places]
        while places:
            drafts = dict(zip(places, self._make_drafts(plans), strict=True))
            for place, draft in drafts.items():
                if not draft.answer_ids or draft.num_tokens <= self._cutoff:
                    encoded[place] = self._encoded(draft)
                elif draft.kept == 0:
                    encoded[place] = self._cut_hard(draft)
            places = [place for place in places if place not in encoded]
            plans = self._shorter_plans([drafts[place] for place in places])
        nothing = EncodedRow(prompt_ids=[], answer_ids=[])
        return [encoded.get(place, nothing) for place in range(len(rows))]

    def prompt(self, row: TextRow) -> str:
        """Return the text of a row's prompt before anything is cut."""
        return self._template.script(row).prompt

    def _first_plan(self, row: TextRow) -> _Plan:
        """Return the plan of a whole row, except for text that could never fit."""
        clipped = len(self._template.open_text(row)) > self._max_characters
        return _Plan(row=row, kept=self._max_characters if clipped else None, cut=clipped)

    def _make_drafts(self, plans: Sequence[_Plan]) -> list[_Draft]:
        scripts = [self._template.script(plan.row, plan.kept) for plan in plans]
        parts = self._split_tokens([plan.row for plan in plans], scripts)
        drafts = []
        for plan, script, (prompt, answer) in zip(plans, scripts, parts, strict=True):
            ends = [] if not answer or answer[-1:] == [script.end] else [self._eos]
            drafts.append(
                _Draft(
                    row=plan.row,
                    kept=plan.kept,
                    cut=plan.cut,
                    script=script,
                    prompt_ids=[*self._begin, *prompt],
                    answer_ids=[*answer, *ends],
                )
            )
        return drafts

    def _split_tokens(
        self, rows: Sequence[TextRow], scripts: Sequence[Script]
    ) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of every prompt and the tokens of its answer."""
        sizes = [_shared_length(row, script) for row, script in zip(rows, scripts, strict=True)]
        texts = [script.prompt + script.answer for script in scripts]
        wholes = self._text_tokenizer.encode_with_heads(
            [text[:size] for text, size in zip(texts, sizes, strict=True)],
            [text[size:] for text, size in zip(texts, sizes, strict=True)],
        )
        prompt_ends = [script.marker or script.prompt[-_WINDOW:] for script in scripts]
        distinct = list(dict.fromkeys(prompt_ends))
        alone = dict(zip(distinct, self._text_tokenizer.encode(distinct), strict=True))
        tails = self._text_tokenizer.encode(
            [end + script.answer for end, script in zip(prompt_ends, scripts, strict=True)]
        )
        split = {
            n: _split_whole(wholes[n], alone[end], tails[n])
            if scripts[n].answer
            else (wholes[n], [])
            for n, end in enumerate(prompt_ends)
        }
        unsure = [n for n, pair in split.items() if pair is None]
        prompts = self._text_tokenizer.encode([scripts[n].prompt for n in unsure])
        for n, prompt in zip(unsure, prompts, strict=True):
            whole = wholes[n]
            if whole[: len(prompt)] == prompt:
                answer = whole[len(prompt) :]
            else:
                answer = self._text_tokenizer.encode_inside([scripts[n].answer])[0]
            split[n] = (prompt, answer)
        return [pair for pair in split.values() if pair is not None]

    def _encoded(self, draft: _Draft) -> EncodedRow:
        if not draft.answer_ids:
            return EncodedRow(prompt_ids=[], answer_ids=[])
        self._ends.add(draft.answer_ids[-1])
        return EncodedRow(
            prompt_ids=draft.prompt_ids,
            answer_ids=draft.answer_ids,
            prompt_targets=self._prompt_targets(draft),
            prompt_cut=draft.cut,
        )

    def _prompt_targets(self, draft: _Draft) -> list[int]:
        """Return the places of the prompt's tokens that begin in an earlier answer."""
        spans = self._template.earlier_answers(draft.row, draft.kept) if draft.row.turns else ()
        if not spans:
            return []
        assert not self._begin, "only a template that begins the sequence has such spans"
        borders = [place for span in spans for place in span]
        counts = self._text_tokenizer.tokens_before(draft.script.prompt, borders)
        pairs = zip(counts[::2], counts[1::2], strict=True)
        # the first token is no target: no token comes before it and predicts it
        return [place for start, stop in pairs for place in range(max(1, start), stop)]

    def _shorter_plans(self, drafts: Sequence[_Draft]) -> list[_Plan]:
        """Return shorter plans for rows that do not fit: fewer turns, or less open text."""
        texts = [self._template.open_text(draft.row)[: draft.kept] for draft in drafts]
        overs = [draft.num_tokens - self._cutoff for draft in drafts]
        sizes = [_WINDOW + _CHARACTERS_PER_TOKEN * over for over in overs]
        ends = [text[-size:] for text, size in zip(texts, sizes, strict=True)]
        before = self._text_tokenizer.characters_before(ends, overs)
        plans = []
        for draft, text, end, place, over in zip(drafts, texts, ends, before, overs, strict=True):
            # a token stands for at least one byte
            rest = self._template.without_oldest_turns(draft.row, over)
            if rest is not None:
                plans.append(replace(self._first_plan(rest), cut=True))
                continue
            kept = min(len(text) - len(end) + place, len(text) - 1)
            plans.append(_Plan(row=draft.row, kept=max(0, kept), cut=draft.cut or bool(text)))
        return plans

    def _cut_hard(self, draft: _Draft) -> EncodedRow:
        """Cut a row without open text: first the rest of its prompt, then the answer."""
        script = draft.script
        marker = self._text_tokenizer.encode_inside([script.marker])[0] if script.marker else []
        room = self._room_before(marker)
        answer = draft.answer_ids[:room]
        room -= len(answer)
        text = script.prompt.removesuffix(script.marker)
        head = [*self._begin, *(self._text_tokenizer.encode([text])[0] if text else [])]
        answer_cut = len(answer) < len(draft.answer_ids)
        if not answer_cut:
            self._ends.add(answer[-1])
        return EncodedRow(
            prompt_ids=head[:room] + marker,
            answer_ids=answer,
            prompt_cut=draft.cut or len(head) > room,
            answer_cut=answer_cut,
        )

    def _room_before(self, marker: Sequence[int]) -> int:
        if self._cutoff < len(marker) + 2:
            raise DataError(
                f"data.cutoff_tokens: got {self._cutoff}, the response marker alone takes "
                f"{len(marker)}; need at least {len(marker) + 2}, sensibly some hundred"
            )
        return self._cutoff - len(marker)


def _split_whole(
    whole: list[int], before: list[int], tail: list[int]
) -> tuple[list[int], list[int]] | None:
    """Return the tokens of the prompt and of the answer; None if they cannot be told apart.

    An answer has the same tokens after the prompt's end alone as after the whole prompt, if both
    texts have the same tokens at that end. Then the prompt needs no tokenising of its own.

    Args:
        whole: the tokens of prompt and answer together.
        before: the tokens of the prompt's end alone.
        tail: the tokens of the prompt's end and the answer.
    """
    size = len(tail) - len(before)
    if not before or size <= 0 or tail[: len(before)] != before:
        return None
    prompt, answer = whole[:-size], whole[-size:]
    context = before[-_CONTEXT_TOKENS:]
    agreed = answer == tail[-size:] and prompt[-len(context) :] == context
    return (prompt, answer) if agreed else None


def _shared_length(row: TextRow, script: Script) -> int:
    """Return how many characters at the beginning of a prompt other rows probably share.

    These end with the instruction. The number depends on the row alone, because its tokens must
    not depend on other rows.
    """
    at = script.prompt.find(row.instruction) if len(row.instruction) >= _MIN_SHARED else -1
    return 0 if at < 0 else at + len(row.instruction)
