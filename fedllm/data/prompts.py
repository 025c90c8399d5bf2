"""Prompt templates: how a row becomes the text of its prompt and the text of its answer.

A template gives a `Script`. Whatever has to be cut is cut from the prompt's open text first (the
input, and the instruction before it), at its end; so a template says which text that is and what
follows it, and makes the script anew with as much of it as may stay.
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
# a private-use character: no template and no tokenizer treats it as anything but text
_PROBE = "\ue000"


@dataclass(frozen=True, kw_only=True)
class Script:
    """A row as text: tokens of `prompt + answer` are what a model reads.

    `marker` ends the prompt: what follows the open text. The answer is empty where there is
    nothing to train, else it ends with `end`, the end of the turn; where that is None, the
    tokenizer's end of sequence has to follow.
    """

    prompt: str
    answer: str
    marker: str
    end: int | None = None


class Template(Protocol):
    """A way to write rows as text."""

    @property
    def begins_sequence(self) -> bool:
        """Say whether the prompt has the beginning of the sequence already."""

    @property
    def leads(self) -> Sequence[str]:
        """Return what it writes before answers that a prompt does not end with."""

    def marker(self) -> str:
        """Return what follows the open text in the prompt of an ordinary row."""

    def open_text(self, row: TextRow) -> str:
        """Return the text of a row's prompt that may be cut."""

    def script(self, row: TextRow, kept: int | None = None) -> Script:
        """Return the script with the first `kept` characters of the open text; None: all."""

    def earlier(self, row: TextRow, kept: int | None = None) -> Sequence[tuple[int, int]]:
        """Return the characters [start, stop) of the prompt that the assistant wrote before.

        They are of the turns before the last one, the ends of those turns included.
        """

    def shorter(self, row: TextRow, num_bytes: int) -> TextRow | None:
        """Return a row without its oldest turns, as few as hold `num_bytes` or one exchange.

        None where all turns are needed.
        """


class _Plain:
    """Instruction and input as they are, a blank line between them; the answer right behind."""

    begins_sequence = False
    leads: Sequence[str] = ()
    name = "plain"

    def marker(self) -> str:
        return ""

    def open_text(self, row: TextRow) -> str:
        row = _ordinary(row, self.name)
        return _content(row)

    def script(self, row: TextRow, kept: int | None = None) -> Script:
        marker = self.marker()
        prompt = self.open_text(row)[:kept] + marker
        return Script(prompt=prompt, answer=row.answer, marker=marker)

    def earlier(self, _row: TextRow, _kept: int | None = None) -> Sequence[tuple[int, int]]:
        return ()

    def shorter(self, _row: TextRow, _num_bytes: int) -> TextRow | None:
        return None


class _Alpaca(_Plain):
    """Alpaca's prompt; without an instruction the input takes its place."""

    name = "alpaca"

    def marker(self) -> str:
        return _RESPONSE_MARKER

    def open_text(self, row: TextRow) -> str:
        row = _ordinary(row, self.name)
        if not row.instruction or not row.input:
            return _WITHOUT_INPUT + row.instruction + row.input
        return _WITH_INPUT + row.instruction + _INPUT_MARKER + row.input


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a chat template writes around the last question and around its answer."""

    marker: str
    lead: str
    rest: str
    written_end: str
    end: int | None


class _Chat:
    """The tokenizer's own template, as a chat server uses it."""

    begins_sequence = True

    def __init__(self, tokenizer: Any) -> None:
        self._template = ChatTemplate(tokenizer)
        self._whole_tokens = _whole_tokens(tokenizer)
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._check()

    @property
    def leads(self) -> Sequence[str]:
        return sorted({layout.lead for layout in self._layouts.values()})

    def marker(self) -> str:
        return next((layout.marker for layout in self._layouts.values()), "")

    def open_text(self, row: TextRow) -> str:
        turns = _turns(row)
        return turns[-2].content if _may_cut(turns) else ""

    def script(self, row: TextRow, kept: int | None = None) -> Script:
        turns = _turns(row, kept)
        layout = self._layout(turns)
        prompt = self._prompt(turns)
        answer = self._answer(self._behind(turns, prompt), layout)
        return Script(prompt=prompt, answer=answer, marker=layout.marker, end=layout.end)

    def earlier(self, row: TextRow, kept: int | None = None) -> Sequence[tuple[int, int]]:
        turns = _turns(row, kept)
        prompt = self._prompt(turns)
        wrote = [n for n, turn in enumerate(turns[:-1]) if turn.role == "assistant"]
        found = (self._written_by(n, turns, prompt) for n in wrote if turns[n].content)
        return [span for span in found if span is not None]

    def shorter(self, row: TextRow, num_bytes: int) -> TextRow | None:
        """Return a conversation without its oldest exchanges; what the system said stays."""
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
        """Refuse a template that renders neither a question alone nor one behind a system turn."""
        question, answer = Turn(role="user", content="?"), Turn(role="assistant", content="!")
        system = Turn(role="system", content=".")
        try:
            self._layout((question, answer))
        except DataError:
            try:
                self._layout((system, question, answer))
                return
            except DataError:
                pass
            raise

    def _prompt(self, turns: Sequence[Turn]) -> str:
        if len(turns) > 1:
            return self._template.render(turns[:-1], opens_answer=True)
        # nobody asked: all that stands before the answer is the template's own
        return self._template.render((replace(turns[0], content=_PROBE),)).partition(_PROBE)[0]

    def _behind(self, turns: Sequence[Turn], prompt: str) -> str:
        """Return what the whole conversation has behind the prompt."""
        whole = self._template.render(turns)
        if not whole.startswith(prompt):
            opened, wrote = _difference(prompt, whole)
            raise DataError(
                f"data.template: {self._template.name} opens an answer with {opened!r}, but shows "
                f"it in a conversation as {wrote!r}: what is trained would not follow what a "
                "server asks; correct it or use data.template=alpaca"
            )
        return whole[len(prompt) :]

    def _layout(self, turns: Sequence[Turn]) -> _Layout:
        """Return what stands around question and answer, found once for each order of roles."""
        roles = tuple(turn.role for turn in turns)
        if roles not in self._layouts:
            self._layouts[roles] = self._found(turns)
        return self._layouts[roles]

    def _found(self, turns: Sequence[Turn]) -> _Layout:
        prompt = self._prompt(turns)
        answered = (*turns[:-1], replace(turns[-1], content=_PROBE))
        lead, shown, rest = self._behind(answered, prompt).partition(_PROBE)
        marker = ""
        if len(turns) > 1:
            asked = replace(turns[-2], content=_PROBE)
            _, asked_shown, marker = self._prompt((*turns[:-2], asked, turns[-1])).rpartition(
                _PROBE
            )
            shown = shown and asked_shown
        if not shown:
            raise DataError(
                f"data.template: {self._template.name} does not show the text of the user and of "
                "the assistant; correct it or use data.template=alpaca"
            )
        end, token = self._end(rest)
        return _Layout(marker=marker, lead=lead, rest=rest, written_end=end, end=token)

    def _end(self, rest: str) -> tuple[str, int | None]:
        """Return the text behind an answer, up to and with its first special token, and that."""
        for tokens in self._whole_tokens:
            places = {text: rest.find(text) for text in tokens if text in rest}
            if places:
                # the longest of those that begin first
                first = min(places, key=lambda text: (places[text], -len(text)))
                return rest[: places[first] + len(first)], tokens[first]
        return rest.rstrip(), None

    def _answer(self, behind: str, layout: _Layout) -> str:
        """Return the answer as the template wrote it, with the end of its turn."""
        if behind.endswith(layout.rest):
            behind = behind[: len(behind) - len(layout.rest)]
            return behind + layout.written_end if behind != layout.lead else ""
        # what it writes behind an answer depends on the answer
        at = behind.rfind(layout.written_end) if layout.written_end else len(behind)
        if at < 0:
            raise DataError(
                f"data.template: {self._template.name} ends a turn with {layout.written_end!r}, "
                f"but this one with {behind[-20:]!r}; correct it or use data.template=alpaca"
            )
        return behind[:at] + layout.written_end

    def _written_by(self, place: int, turns: Sequence[Turn], prompt: str) -> tuple[int, int] | None:
        """Return the characters of one assistant turn in a prompt, None where it is left out."""
        layout = self._layout(turns)
        probed = (*turns[:place], replace(turns[place], content=_PROBE), *turns[place + 1 :])
        before, shown, after = self._prompt(probed).partition(_PROBE)
        if not shown:
            return None
        start, stop = len(before), len(prompt) - len(after)
        if start > stop or not (prompt.startswith(before) and prompt.endswith(after)):
            raise DataError(
                f"data.template: {self._template.name} writes other turns differently because of "
                f"{turns[place].content[:40]!r}, so which text is the assistant's cannot be told; "
                "correct it, or give each answer a row of its own"
            )
        start -= len(layout.lead) * before.endswith(layout.lead)
        return start, stop + len(self._end_of_earlier(after, layout))

    def _end_of_earlier(self, after: str, layout: _Layout) -> str:
        if after.startswith(layout.written_end):
            return layout.written_end
        # another token than behind the last turn; what follows a gap begins the next turn
        directly = (text for tokens in self._whole_tokens for text in tokens)
        return max(filter(after.startswith, directly), key=len, default="")


def _difference(prompt: str, whole: str) -> tuple[str, str]:
    """Return a little of two texts, from shortly before they differ."""
    pairs = zip(prompt, whole, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
    near = slice(max(0, at - 12), at + 20)
    return prompt[near], whole[near].replace(_PROBE, "...")


def _whole_tokens(tokenizer: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tokens that a tokenizer never splits, by their text: special ones, and others."""
    found: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for number, token in tokenizer.added_tokens_decoder.items():
        if token.content.strip():
            found[not token.special][token.content] = number
    return found


def _content(row: TextRow) -> str:
    """Return instruction and input as one text."""
    between = "\n\n" if row.instruction and row.input else ""
    return f"{row.instruction}{between}{row.input}"


def _turns(row: TextRow, kept: int | None = None) -> tuple[Turn, ...]:
    """Return a row as a conversation: an ordinary one is a question and its answer.

    Of what is answered last, the first `kept` characters stay; None: all.
    """
    turns = row.turns or (
        Turn(role="user", content=_content(row)),
        Turn(role="assistant", content=row.answer),
    )
    if kept is None or not _may_cut(turns):
        return turns
    asked = replace(turns[-2], content=turns[-2].content[:kept])
    return (*turns[:-2], asked, turns[-1])


def _may_cut(turns: Sequence[Turn]) -> bool:
    """Say whether the turn before the answer may be cut: an answer is trained with its end."""
    return len(turns) > 1 and turns[-2].role != "assistant"


def _ordinary(row: TextRow, template: str) -> TextRow:
    """Return a conversation of one question and its answer as an ordinary row.

    Raises:
        DataError: it has other turns.
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
