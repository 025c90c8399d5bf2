"""Prompt templates: how a row becomes the text of its prompt and the text of its answer.

A template returns a `Script`. A row that is too long loses text from the end of the prompt's open
text first (the instruction and, after it, the input). So a template also returns that open text,
and can write a script with the beginning of it only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fedllm.data.chat import ChatTemplate
from fedllm.data.turns import TextRow, Turn
from fedllm.errors import DataError

# Alpaca's prompt (Stanford, https://github.com/tatsu-lab/stanford_alpaca), with and without input.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)
_INPUT_MARKER = "\n\n### Input:\n"
_RESPONSE_MARKER = "\n\n### Response:\n"
# a private-use character: every template and tokenizer treats it as text
_PLACEHOLDER = "\ue000"


@dataclass(frozen=True, kw_only=True)
class Script:
    """Row as text: a model reads the tokens of `prompt + answer`.

    `marker` is the end of the prompt, after the open text. The answer is empty if there is nothing
    to train. Else it ends with the token `end`, the end of the turn; if that is None, the
    tokenizer's end of sequence has to follow.
    """

    prompt: str
    answer: str
    marker: str
    end: int | None = None


class Template(Protocol):
    """Template that writes rows as text."""

    @property
    def begins_sequence(self) -> bool:
        """Return whether the prompt already has the beginning of the sequence."""

    @property
    def leads(self) -> Sequence[str]:
        """Return the texts that it writes before answers and that are not part of the prompt."""

    def marker(self) -> str:
        """Return the text after the open text in the prompt of a row without turns."""

    def open_text(self, row: TextRow) -> str:
        """Return the text of a row's prompt that may be cut."""

    def script(self, row: TextRow, kept: int | None = None) -> Script:
        """Return the script with the first `kept` characters of the open text; None: with all."""

    def earlier_answers(self, row: TextRow, kept: int | None = None) -> Sequence[tuple[int, int]]:
        """Return the spans [start, stop) of earlier answers, in characters of the prompt.

        The ends of those turns are included.
        """

    def without_oldest_turns(self, row: TextRow, num_bytes: int) -> TextRow | None:
        """Return a row without its oldest turns: as few as hold `num_bytes`, at least an exchange.

        None if no turn can be left out.
        """


class _Plain:
    """Template `plain`: instruction, a blank line and input, directly followed by the answer."""

    begins_sequence = False
    leads: Sequence[str] = ()
    name = "plain"

    def marker(self) -> str:
        return ""

    def open_text(self, row: TextRow) -> str:
        row = _as_single_turn(row, self.name)
        return _content(row)

    def script(self, row: TextRow, kept: int | None = None) -> Script:
        marker = self.marker()
        prompt = self.open_text(row)[:kept] + marker
        return Script(prompt=prompt, answer=row.answer, marker=marker)

    def earlier_answers(self, _row: TextRow, _kept: int | None = None) -> Sequence[tuple[int, int]]:
        return ()

    def without_oldest_turns(self, _row: TextRow, _num_bytes: int) -> TextRow | None:
        return None


class _Alpaca(_Plain):
    """Template `alpaca`; without an instruction the input takes its place."""

    name = "alpaca"

    def marker(self) -> str:
        return _RESPONSE_MARKER

    def open_text(self, row: TextRow) -> str:
        row = _as_single_turn(row, self.name)
        if not row.instruction or not row.input:
            return _WITHOUT_INPUT + row.instruction + row.input
        return _WITH_INPUT + row.instruction + _INPUT_MARKER + row.input


@dataclass(frozen=True, kw_only=True)
class _AnswerFrame:
    """Text that a chat template writes around an answer.

    `marker` is the text between the question and the end of the prompt, `lead` the text between
    the prompt and the answer, and `rest` the text after the answer. `written_end` is the part of
    `rest` that ends the turn, and `end` its token.
    """

    marker: str
    lead: str
    rest: str
    written_end: str
    end: int | None


class _Chat:
    """Template `chat`: the tokenizer's own template, as a chat server uses it."""

    begins_sequence = True

    def __init__(self, tokenizer: Any) -> None:
        self._template = ChatTemplate(tokenizer)
        self._unsplit_tokens = _unsplit_tokens(tokenizer)
        self._frames: dict[tuple[str, ...], _AnswerFrame] = {}
        self._check()

    @property
    def leads(self) -> Sequence[str]:
        return sorted({frame.lead for frame in self._frames.values()})

    def marker(self) -> str:
        return next((frame.marker for frame in self._frames.values()), "")

    def open_text(self, row: TextRow) -> str:
        turns = _turns(row)
        return turns[-2].content if _may_cut(turns) else ""

    def script(self, row: TextRow, kept: int | None = None) -> Script:
        turns = _turns(row, kept)
        frame = self._frame(turns)
        prompt = self._prompt(turns)
        answer = self._answer(self._text_after(turns, prompt), frame)
        return Script(prompt=prompt, answer=answer, marker=frame.marker, end=frame.end)

    def earlier_answers(self, row: TextRow, kept: int | None = None) -> Sequence[tuple[int, int]]:
        turns = _turns(row, kept)
        prompt = self._prompt(turns)
        answered = [n for n, turn in enumerate(turns[:-1]) if turn.role == "assistant"]
        spans = (self._assistant_span(n, turns, prompt) for n in answered if turns[n].content)
        return [span for span in spans if span is not None]

    def without_oldest_turns(self, row: TextRow, num_bytes: int) -> TextRow | None:
        """Return a conversation without its oldest exchanges; system turns stay."""
        first = next((n for n, turn in enumerate(row.turns) if turn.role != "system"), 0)
        dropped = 0
        rest = None
        for place in range(first, len(row.turns)):
            if place > first and row.turns[place].role == "user":
                rest = replace(row, turns=(*row.turns[:first], *row.turns[place:]))
                if dropped >= num_bytes:
                    break
            dropped += len(row.turns[place].content.encode())
        return rest

    def _check(self) -> None:
        """Raise DataError if a question renders neither alone nor after a system turn."""
        question, answer = Turn(role="user", content="?"), Turn(role="assistant", content="!")
        system = Turn(role="system", content=".")
        try:
            self._frame((question, answer))
        except DataError:
            try:
                self._frame((system, question, answer))
                return
            except DataError:
                pass
            raise

    def _prompt(self, turns: Sequence[Turn]) -> str:
        if len(turns) > 1:
            return self._template.render(turns[:-1], opens_answer=True)
        # without a question, all text before the answer is the template's own
        rendered = self._template.render((replace(turns[0], content=_PLACEHOLDER),))
        return rendered.partition(_PLACEHOLDER)[0]

    def _text_after(self, turns: Sequence[Turn], prompt: str) -> str:
        """Return the text of the whole conversation after the prompt."""
        whole = self._template.render(turns)
        if not whole.startswith(prompt):
            opened, shown = _difference(prompt, whole)
            raise DataError(
                f"data.template: {self._template.name} opens an answer with {opened!r}, but shows "
                f"it in a conversation as {shown!r}: the trained text would differ from the prompt "
                "of a server; correct it or use data.template=alpaca"
            )
        return whole[len(prompt) :]

    def _frame(self, turns: Sequence[Turn]) -> _AnswerFrame:
        """Return the frame of the last answer, computed once for each order of roles."""
        roles = tuple(turn.role for turn in turns)
        if roles not in self._frames:
            self._frames[roles] = self._find_frame(turns)
        return self._frames[roles]

    def _find_frame(self, turns: Sequence[Turn]) -> _AnswerFrame:
        prompt = self._prompt(turns)
        answered = (*turns[:-1], replace(turns[-1], content=_PLACEHOLDER))
        lead, shown, rest = self._text_after(answered, prompt).partition(_PLACEHOLDER)
        marker = ""
        if len(turns) > 1:
            question = replace(turns[-2], content=_PLACEHOLDER)
            prompt = self._prompt((*turns[:-2], question, turns[-1]))
            _, question_shown, marker = prompt.rpartition(_PLACEHOLDER)
            shown = shown and question_shown
        if not shown:
            raise DataError(
                f"data.template: {self._template.name} does not show the text of the user and of "
                "the assistant; correct it or use data.template=alpaca"
            )
        end, token = self._end(rest)
        return _AnswerFrame(marker=marker, lead=lead, rest=rest, written_end=end, end=token)

    def _end(self, rest: str) -> tuple[str, int | None]:
        """Return the end of a turn: the text up to its first special token, and that token."""
        for tokens in self._unsplit_tokens:
            places = {text: rest.find(text) for text in tokens if text in rest}
            if places:
                # the longest of the tokens that begin first
                first = min(places, key=lambda text: (places[text], -len(text)))
                return rest[: places[first] + len(first)], tokens[first]
        return rest.rstrip(), None

    def _answer(self, text: str, frame: _AnswerFrame) -> str:
        """Return the answer as the template writes it, with the end of its turn."""
        if text.endswith(frame.rest):
            text = text[: len(text) - len(frame.rest)]
            return text + frame.written_end if text != frame.lead else ""
        # the text after an answer depends on the answer
        at = text.rfind(frame.written_end) if frame.written_end else len(text)
        if at < 0:
            raise DataError(
                f"data.template: {self._template.name} ends a turn with {frame.written_end!r}, "
                f"but this one with {text[-20:]!r}; correct it or use data.template=alpaca"
            )
        return text[:at] + frame.written_end

    def _assistant_span(
        self, place: int, turns: Sequence[Turn], prompt: str
    ) -> tuple[int, int] | None:
        """Return the span of an assistant turn in a prompt, None if the template omits it."""
        frame = self._frame(turns)
        marked = (*turns[:place], replace(turns[place], content=_PLACEHOLDER), *turns[place + 1 :])
        before, shown, after = self._prompt(marked).partition(_PLACEHOLDER)
        if not shown:
            return None
        start, stop = len(before), len(prompt) - len(after)
        if start > stop or not (prompt.startswith(before) and prompt.endswith(after)):
            raise DataError(
                f"data.template: {self._template.name} writes other turns differently because of "
                f"{turns[place].content[:40]!r}, so the assistant's text cannot be found; correct "
                "it, or give each answer a row of its own"
            )
        start -= len(frame.lead) * before.endswith(frame.lead)
        return start, stop + len(self._end_of_earlier(after, frame))

    def _end_of_earlier(self, after: str, frame: _AnswerFrame) -> str:
        if after.startswith(frame.written_end):
            return frame.written_end
        # earlier turns may end with another token than the last turn, directly after the text
        directly = (text for tokens in self._unsplit_tokens for text in tokens)
        return max(filter(after.startswith, directly), key=len, default="")


def _difference(prompt: str, whole: str) -> tuple[str, str]:
    """Return short parts of two texts, from shortly before the place where they differ."""
    pairs = zip(prompt, whole, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
    near = slice(max(0, at - 12), at + 20)
    return prompt[near], whole[near].replace(_PLACEHOLDER, "...")


def _unsplit_tokens(tokenizer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tokens that a tokenizer never splits, by their text: special and other ones."""
    tokens: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.content.strip():
            tokens[not token.special][token.content] = number
    return tokens


def _content(row: TextRow) -> str:
    """Return instruction and input as one text."""
    between = "\n\n" if row.instruction and row.input else ""
    return f"{row.instruction}{between}{row.input}"


def _turns(row: TextRow, kept: int | None = None) -> tuple[Turn, ...]:
    """Return the turns of a row; a row without turns becomes a question and its answer.

    The last question keeps its first `kept` characters; None: all.
    """
    turns = row.turns or (
        Turn(role="user", content=_content(row)),
        Turn(role="assistant", content=row.answer),
    )
    if kept is None or not _may_cut(turns):
        return turns
    question = replace(turns[-2], content=turns[-2].content[:kept])
    return (*turns[:-2], question, turns[-1])


def _may_cut(turns: Sequence[Turn]) -> bool:
    """Return whether the turn before the answer may be cut; an earlier answer may not."""
    return len(turns) > 1 and turns[-2].role != "assistant"


def _as_single_turn(row: TextRow, template: str) -> TextRow:
    """Return a row without turns; a conversation may have one question and its answer only.

    Raises:
        DataError: a conversation has other turns.
    """
    if not row.turns:
        return row
    roles = [turn.role for turn in row.turns]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"data.template: got {template}, but a row is a conversation ({', '.join(roles)}), "
            "which it cannot write; use data.template=chat"
        )
    return replace(row, instruction=row.turns[0].content, turns=())


TEMPLATES: dict[str, Callable[[Any], Template]] = {
    "alpaca": lambda _tokenizer: _Alpaca(),
    "chat": _Chat,
    "plain": lambda _tokenizer: _Plain(),
}
